"""A fresh copy of the project in which commands of the documentation run as they are printed."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Mapping
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.processes.process import clean_environment
from tests.support.waiting import TIMEOUT_S

_READY = ("bin/uv", ".run-ready", ".dev-ready", ".clients-ready")
"""What make finds when all is installed."""
_COMMAND = "#!{python}\nimport sys\nfrom comfy_worker.cli.main import main\nsys.exit(main())\n"


class Checkout:
    """A copy of what git knows and does not ignore, with an environment that runs the copy's code.

    The environment has the packages of the one that runs the tests, so that nothing has to be installed.
    """

    def __init__(self, folder: Path) -> None:
        """Make the copy in a folder that is not there yet."""
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in names:
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        self._install()

    def _install(self) -> None:
        environment = self.folder / ".venv"
        venv.create(environment, symlinks=True)
        [packages] = environment.glob("lib/python*/site-packages")
        packages.joinpath("tests.pth").write_text(f"{self.folder / 'src'}\n{sysconfig.get_path('purelib')}\n")
        command = environment / "bin/comfy-worker"
        command.write_text(_COMMAND.format(python=environment / "bin/python"))
        command.chmod(0o755)
        for name in _READY:
            (environment / name).touch()

    def run(self, block: str, environment: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> str:
        """Return what a block of commands prints; each has to end with 0, and each `curl` with an answer below 400."""
        script = f'set -euo pipefail\ncurl() {{ command curl --fail --silent --show-error "$@"; }}\n{block}'
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=clean_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout
