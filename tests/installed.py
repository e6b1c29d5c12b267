"""What somebody does who installed the wheel without extras; .ci/run starts it in an environment of its own."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import moe_kernels


def main() -> None:
    # Its own folder comes first when Python starts a file; what is imported must be what is installed.
    assert Path(sys.prefix) in Path(moe_kernels.__file__).parents, f"moe_kernels comes from {moe_kernels.__file__}"
    for name in ("reference", "benchmarks", "examples", "flax", "matplotlib"):
        assert importlib.util.find_spec(name) is None, f"{name} was installed with the layer"

    page = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    layer, gradient = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[:2]
    assert "moe_mlp(" in layer and "jax.grad" in gradient
    exec(layer + gradient, {"__name__": "__main__"})

    for command in ([Path(sys.executable).with_name("limoe")], [sys.executable, "-m", "limoe"]):
        done = subprocess.run([*command, "train"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "", done
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert version.stdout == f"limoe {importlib.metadata.version('limoe-jax')}\n", version.stdout
        assert done.stderr.count("\n") == 1 and "pip install '.[train]'" in done.stderr, done.stderr
    print(f"the README's layer ran with {moe_kernels.__file__}; limoe train says: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
