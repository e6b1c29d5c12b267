"""Settings of the parameters that a run begins with."""

from dataclasses import dataclass

from limoe.config.section import Section, setting


@dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """The trained model whose parameters a run begins with."""

    section = "init"

    source: str = setting("work folder of a run, or export, whose parameters to begin with; empty = none", "")
    digest: str = setting("SHA-256 of the weights that were read, written by the run; given, others are refused", "")
    upcycle: bool = setting("make experts of the MLPs of a dense source (sparse upcycling)", False)
    noise: float = setting("upcycling: std of the noise on each expert's kernels, as a share of theirs", 0.0)

    def _check(self) -> None:
        self._require_not_negative("noise")
        for name in ("digest", "upcycle", "noise"):
            self._require(bool(self.source) or not getattr(self, name), name, "needs init.source")
        self._require(self.upcycle or not self.noise, "noise", "needs init.upcycle=true")
