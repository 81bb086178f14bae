"""`runner render`: the Kubernetes objects of a run, for `kubectl apply` and for GitOps."""

from __future__ import annotations

import logging

import typer

from runner.cli.common import (
    ImageOption,
    JobFile,
    NamespaceOption,
    OutputOption,
    ParamOption,
    ProfileOption,
    RunIdOption,
    StoreOption,
    load,
    print_json,
)

log = logging.getLogger(__name__)


def render(
    job: JobFile,
    param: ParamOption = None,
    store: StoreOption = None,
    image: ImageOption = None,
    profile: ProfileOption = None,
    namespace: NamespaceOption = None,
    run_id: RunIdOption = None,
    output: OutputOption = "text",
) -> None:
    """Print the Kubernetes objects of a run: what submit --launcher kubernetes would create."""
    from runner.job import check_run_id
    from runner.launch.kubernetes import objects

    loaded = load(job, param, None, store, image=image, profile=profile, namespace=namespace)
    rendered = objects.render(loaded, check_run_id(run_id or loaded.name))
    for warning in rendered.warnings:
        log.warning("%s", warning)
    if output == "json":
        print_json({"apiVersion": "v1", "kind": "List", "items": rendered.objects})
    else:
        typer.echo(rendered.as_yaml(), nl=False)
