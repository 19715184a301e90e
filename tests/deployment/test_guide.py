"""The commands of docs/deployment.md, as they stand there, in namespaces where its names and folders are free."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.application import copy_application
from scripts.federation import SPEAKS_GRPC
from scripts.processes import CHECKOUT

from .helpers import check_same_model, run_in_one_process

PAGE = (CHECKOUT / "docs" / "deployment.md").read_text()
BLOCKS: list[str] = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
NAMESPACES = ["unshare", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
OUTPUT = "/srv/fedpm/output/first"
SITES = ("lab", "clinic", "bank")
TRAINED: dict[str, Any] = {"model": "cnn", "local_steps": 0, "num_server_rounds": 5, "min_available_nodes": 3}
"""The page's run; ``config`` of the helpers has other defaults."""

_DATA = """
from pathlib import Path
from typing import Any
from fedpm_flwr.config import Config
from scripts.deploy_demo import write_data
write_data(Path("/srv/fedpm"), Config(alpha=1.0))
"""


def block(*words: str) -> str:
    """The one block with all of these words."""
    (found,) = [text for text in BLOCKS if all(word in text for word in words)]
    return found


def session(folder: Path) -> str:
    """A shell script: what somebody types who follows the page, in several shells of one machine."""
    logs = folder / "logs"
    return "\n".join(
        [
            "set -e",
            "ip link set lo up",
            "mount -t tmpfs tmpfs /srv",
            f"cp /etc/hosts {folder}/hosts && echo 127.0.0.1 superlink.example.org >> {folder}/hosts",
            f"mount --bind {folder}/hosts /etc/hosts",
            f"cd {folder}/fedpm-flwr",
            block("activate"),
            "mkdir -p /srv/fedpm",
            f"python -c '{_DATA}'",
            block("scripts.certificates"),
            f"({block('flower-superlink', '--database')}) > {logs}/superlink.log 2>&1 &",
            "until (echo > /dev/tcp/127.0.0.1/8000) 2> /dev/null; do sleep 0.2; done",
            block("supernode register"),
            block("fedpm_flwr.tasks"),
            *(f"({block('flower-supernode', f'{site}-state')}) > {logs}/{site}.log 2>&1 &" for site in SITES),
            f"({block('flwr run', 'output=')}) > {logs}/run.log 2>&1 & run=$!",
            f"""until grep -qs '"round": 2' {OUTPUT}/metrics.json; do kill -0 $run; sleep 0.2; done""",
            block("flwr stop"),
            "wait $run || true",  # its exit status is not the run's
            f"until test -e {OUTPUT}/model.safetensors; do sleep 0.2; done",
            block("flwr run", "resume="),
            "flwr ls federation --format json",
            f"cp -r {OUTPUT} {folder}/result",
        ]
    )


@pytest.mark.faults
@pytest.mark.skipif(not SPEAKS_GRPC, reason="the page is for the Flower that speaks gRPC")
def test_the_guide(tmp_path: Path) -> None:
    is_there = shutil.which("ip") and Path("/srv").is_dir()
    if not is_there or subprocess.run([*NAMESPACES, "true"], check=False).returncode:
        pytest.skip("needs namespaces, as Linux gives them to root or to all users")
    checkout = copy_application(tmp_path / "fedpm-flwr")
    shutil.copytree(CHECKOUT / "scripts", checkout / "scripts")
    (checkout / ".venv").symlink_to(sys.prefix)
    (tmp_path / "logs").mkdir()
    script = tmp_path / "session.sh"
    script.write_text(session(tmp_path))
    variables = {"HOME": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*NAMESPACES, "bash", str(script)], env=variables, capture_output=True, text=True, timeout=500, check=False
    )
    logs = {path.name: path.read_text()[-2000:] for path in (tmp_path / "logs").iterdir()}
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:], logs)
    assert "taken up after round" in done.stdout
    assert '"finished:completed"' in done.stdout
    assert done.stdout.count("finished:stopped") == 1
    check_same_model(tmp_path / "result", run_in_one_process(tmp_path / "inline", 3, **TRAINED))


def test_every_command_of_the_page_is_run() -> None:
    """But for the installation, which the suite has behind it, and Docker's."""
    script = session(Path("/nowhere"))
    left_out = [text for text in BLOCKS if text not in script and text.strip() not in script]
    assert [text for text in left_out if "pip install" not in text] == []
