"""What `limoe` prints of its commands."""

USAGE = """limoe: train and evaluate a language-image mixture of experts.

  limoe train [--preset=tiny] [--workdir=runs/PRESET] [--set key=value ...] [--profile=STEPS] [--accept-new-data]
              [--init=RUN_OR_EXPORT [--upcycle]] [--rewind=STEP] [--tensorboard]
      Train, evaluate, and write figures and summary.json into the work folder. Without arguments: the tiny model on the
      embedded world, a few minutes on two CPU cores. The same command continues an interrupted run.
      On several hosts: the same command on each; TPU pods, Slurm and GKE are recognised, elsewhere add
      --coordinator=HOST:PORT --num-processes=P --process-id=0..P-1.
  limoe eval --workdir=DIR [--data=SHARDS] [--probe-data=SHARDS] [--json]
      Evaluate the newest checkpoint: zero-shot classification, retrieval, and, given labelled shards, a linear probe.
  limoe classify --workdir=DIR --classes="red circle,blue square" [--templates=imagenet80] [--json] IMAGE...
      How likely each class is for each picture. DIR is a run or an export.
  limoe embed --workdir=DIR --images=FOLDER_OR_SHARDS | --texts=FILE --out=FILE.npz [--step=STEP]
      Embeddings of any number of pictures or texts. The same command goes on where it was stopped.
  limoe export --workdir=DIR --out=DIR [--step=STEP]
      Write a model as safetensors with its settings, tokenizer, model card and encoders as jax.export programs.
  limoe report --workdir=DIR [--out=FILE.html]
      One page of a run, whole or going on, that needs no network: curves, experts over training, examples, settings.
  limoe study NAME [--seeds=3] [--workdir=runs/study] [--scale=smoke|small|full] [--set key=value ...]
  limoe study --list
      Train a grid of settings that answers one question of the paper, and write a table and a picture with intervals.
      The same command continues a stopped study; finished trainings are kept as JSON.
  limoe index --data=SHARDS [--part=3/64] [--check [--out=check.json]] [--jobs=PROCESSES] [--json]
      Index the shards before a run, in parallel; parts may run on other hosts. --check decodes every example once and
      reports what is bad, by reason. The same command goes on where it was stopped.
  limoe describe [--preset=tiny] [--set key=value ...] [--json]
      Parameters and FLOPs of a configuration; nothing is allocated.
  limoe plan --preset=h14 --topology=v5p:8x8x8 [--batch=PAIRS] [--set key=value ...] [--search] [--schedule]
             [--json]
      Compile the train step for a TPU pod without having one: does it fit, and how fast can it be (modelled)?
  limoe settings [--preset=tiny]
      All settings that --set takes, with value, type and unit.
  limoe --help
      All of this, the flags and the settings.
  limoe --version
      The version.
"""
