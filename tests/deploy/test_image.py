"""Dockerfile and .dockerignore, held against the manifest, pyproject.toml and the code."""

import pytest

from mehdb import __version__
from mehdb.settings import SETTINGS, load
from sources import CONTAINER, DOCKERFILE, POD, PYPROJECT, ROOT, Dockerfile


def test_every_stage_stands_on_the_base_that_the_build_argument_names() -> None:
    assert DOCKERFILE.all("ARG")[0] == "BASE=python:3.13-slim"
    bases = [text.split()[0] for text in DOCKERFILE.all("FROM")]
    assert bases == ["${BASE}", "${BASE}"]


def test_the_image_is_of_this_version_and_a_build_of_another_fails() -> None:
    assert DOCKERFILE.all("ARG")[1] == f"VERSION={__version__}"
    (check,) = [text for text in DOCKERFILE.all("RUN") if "--version" in text]
    assert 'test "$(/opt/mehdb/bin/mehdb --version)" = "mehdb ${VERSION}"' in check
    (labels,) = DOCKERFILE.all("LABEL", final=True)
    assert 'org.opencontainers.image.version="${VERSION}"' in labels
    assert f'org.opencontainers.image.licenses="{PYPROJECT["project"]["license"]}"' in labels
    assert {"BASE", "VERSION", "REVISION"} == set(DOCKERFILE.all("ARG", final=True)), "set before a stage, told in it"


def test_a_container_runs_mehdb_serve_without_a_shell() -> None:
    assert DOCKERFILE.command() == ["mehdb", "serve"]
    assert "mehdb" in PYPROJECT["project"]["scripts"]


def test_a_command_in_the_shell_form_is_noticed() -> None:
    """A shell as process 1 would keep SIGTERM from mehdb."""
    with pytest.raises(ValueError, match="Expecting value"):
        Dockerfile.parse("FROM scratch\nENTRYPOINT mehdb\nCMD serve").command()


def test_the_user_is_the_manifests_and_given_by_number() -> None:
    context = POD["securityContext"]
    assert DOCKERFILE.all("USER", final=True) == [f"{context['runAsUser']}:{context['runAsGroup']}"]


def test_the_port_is_the_one_that_a_node_listens_on_by_default() -> None:
    assert DOCKERFILE.all("EXPOSE", final=True) == [str(load({}, {}, find_host_name=lambda: "mehdb").port)]


def test_every_variable_of_mehdb_is_a_setting() -> None:
    variables = {name for name in DOCKERFILE.environment() if name.startswith("MEHDB_")}
    assert variables <= {setting.metadata["variable"] for setting in SETTINGS}


def test_the_data_directory_is_where_the_manifest_mounts_the_volume() -> None:
    (mount,) = [mount["mountPath"] for mount in CONTAINER["volumeMounts"] if mount["name"] == "data"]
    assert DOCKERFILE.environment()["MEHDB_DATADIR"] == mount


def test_nothing_is_installed_but_what_the_lock_files_hold_and_this_source() -> None:
    commands = [part.strip() for text in DOCKERFILE.all("RUN") for part in text.split("&&")]
    installs = [command for command in commands if " install " in command or " wheel " in command]
    sources = [command.split()[-1] for command in installs]
    assert sources == ["requirements-build.lock", "requirements.lock", ".", "/wheels/*"]
    for command, source in zip(installs, sources, strict=True):
        assert ("--require-hashes" if source.endswith(".lock") else "--no-index") in command


def test_the_final_stage_holds_no_build_tools() -> None:
    assert DOCKERFILE.all("COPY", final=True) == ["--from=build /opt/mehdb /opt/mehdb"]
    assert not [text for text in DOCKERFILE.all("RUN", final=True) if "install" in text]
    assert [text for text in DOCKERFILE.all("RUN") if "-m venv --without-pip /opt/mehdb" in text]


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    copied = {name for text in DOCKERFILE.all("COPY") if not text.startswith("--from") for name in text.split()[:-1]}
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)
