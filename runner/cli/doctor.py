"""`runner doctor`: what would fail, before any money is spent."""

from __future__ import annotations

import typer

from runner import exitcodes
from runner.cli.common import (
    ContextOption,
    ImageOption,
    JobFile,
    LauncherOption,
    NamespaceOption,
    OutputOption,
    ParamOption,
    ProfileOption,
    RunIdOption,
    StoreOption,
    load,
    print_json,
)


def doctor(
    job: JobFile,
    param: ParamOption = None,
    launcher: LauncherOption = None,
    store: StoreOption = None,
    run_id: RunIdOption = None,
    image: ImageOption = None,
    profile: ProfileOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    output: OutputOption = "text",
) -> None:
    """Try the store, its permissions and its speed; look at memory, grace, GPU and command."""
    from runner.doctor import Verdict, examine

    findings = []
    loaded = load(job, param, launcher, store, image=image, profile=profile, namespace=namespace)
    for finding in examine(loaded, run_id, context):
        findings.append(finding)
        if output == "text":
            typer.echo(finding.as_line())
    failed = any(finding.verdict is Verdict.FAIL for finding in findings)
    if output == "json":
        print_json({"ok": not failed, "findings": [finding.as_json() for finding in findings]})
    raise typer.Exit(exitcodes.USAGE if failed else exitcodes.FINISHED)
