"""The variants of deploy/, rendered as `kubectl apply -k` does. It judges nothing.

A variant is what somebody may apply: the base, a component with it, all of them, an example. Where neither kustomize
nor kubectl is at hand, tests that need one are skipped; in CI (`CI` is set) they fail: they would prove nothing.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from sources import APP, ROOT

RENDER_TIMEOUT_S: Final = 60
DEPLOY: Final = ROOT / "deploy"
EXAMPLES: Final = ROOT / "examples" / "kubernetes"
RENDERERS: Final = [
    [found, argument] for name, argument in (("kustomize", "build"), ("kubectl", "kustomize"))
    if (found := shutil.which(name))
]  # fmt: skip

FAST_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the other takes a second for the dashboard

# In the order in which they are listed: monitoring first, as those after it tell Prometheus what to show.
COMPONENTS: Final = ("read-write-once-pod", "monitoring", "dashboard", "auth", "tls", "mutual-tls")
NEEDS: Final = {"mutual-tls": ("tls",)}
COMBINATIONS: Final = {
    "base": (),
    **{name: (*NEEDS.get(name, ()), name) for name in COMPONENTS},
    "monitoring-auth": ("monitoring", "auth"),
    "monitoring-tls": ("monitoring", "tls"),
    "monitoring-mutual-tls": ("monitoring", "tls", "mutual-tls"),
    "auth-tls": ("auth", "tls"),
    "all": COMPONENTS,
}
VARIANTS: Final = (*COMBINATIONS, *sorted(path.name for path in EXAMPLES.iterdir()))


def with_components(*names: str) -> list[Path]:
    """Return the folders of components."""
    return [DEPLOY / "components" / name for name in names]


def build(directory: Path, renderer: list[str] | None = None) -> str:
    """Return what kustomize makes of *directory*. It must have nothing to complain about."""
    if not RENDERERS:
        why = "neither kustomize nor kubectl is here"
        if os.environ.get("CI"):
            pytest.fail(f"CI needs one: {why}")
        pytest.skip(why)
    done = subprocess.run(
        [*(renderer or RENDERERS[0]), str(directory)], capture_output=True, text=True, timeout=RENDER_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{directory}: {done.stderr}"
    assert not done.stderr, f"{directory}: {done.stderr}"
    return done.stdout


def rendered_by(renderer: list[str] | None, variant: str) -> str:
    """Return the text of a variant."""
    if variant not in COMBINATIONS:
        return build(EXAMPLES / variant, renderer)
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory).resolve()
        away = {path: os.path.relpath(path, here) for path in (DEPLOY, *with_components(*COMBINATIONS[variant]))}
        base, *components = away.values()
        (here / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "components": components}))
        return build(here, renderer)


def parsed(text: str) -> list[dict[str, Any]]:
    """Return the documents in *text*."""
    return list(yaml.load_all(text, FAST_LOADER))


@functools.cache
def documents(variant: str) -> list[dict[str, Any]]:
    """Return the documents of a variant, or of the one file (`app`). They are everybody's: not to be changed."""
    return APP if variant == "app" else parsed(rendered_by(None, variant))
