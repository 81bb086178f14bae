"""A cluster for tests: Jobs become pods, and pods are real `runner run` processes.

It follows the Job's own `podFailurePolicy`, `backoffLimit`, `podReplacementPolicy` and `suspend`,
as https://kubernetes.io/docs/concepts/workloads/controllers/job/ has them. A pod has a spool and a
disk of its own, which go when it ends; only claims stay. Evicting one is SIGTERM, the pod's grace,
SIGKILL.

    with cluster_on(node, api) as cluster:
        node.call("submit", job)
        pod = cluster.wait_for_pod(printed="step 3")
        cluster.evict(pod)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from nodes import PATIENCE_SECONDS, RUNNER, Node
from servers.kubeapi import KubeApi, now
from waiting import wait_until

_LOOK_SECONDS = 0.02
_JOB_LABEL = "batch.kubernetes.io/job-name"


@dataclass
class Pod:
    """A container on this machine, with what it has of it."""

    name: str
    node: Node
    process: subprocess.Popen[bytes]
    disk: Path
    memory: Path
    log: Path
    grace_seconds: float
    killed_at: float | None = None

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def terminate(self) -> None:
        """SIGTERM to PID 1 alone, as a kubelet does it; later the rest of the grace is over."""
        if self.killed_at is None:
            self.killed_at = time.monotonic() + self.grace_seconds
            self.process.send_signal(signal.SIGTERM)

    def look(self) -> int | None:
        """Its exit code, when it has ended; then nothing of it is left."""
        if self.killed_at is not None and time.monotonic() > self.killed_at:
            self.process.kill()
        code = self.process.poll()
        if code is not None:
            for pid in self.node.processes(self.memory):  # they go with their PID 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for folder in (self.disk, self.memory):
                shutil.rmtree(folder, ignore_errors=True)
        return None if code is None else code if code >= 0 else 128 - code


class SimulatedCluster:
    """The Job controller, and the one node that its pods are on."""

    def __init__(self, node: Node, api: KubeApi, claims: dict[str, Path]) -> None:
        self._node, self._api, self._claims = node, api, claims
        self._pods: dict[str, Pod] = {}
        self._judged: set[str] = set()
        self.started: list[str] = []
        self._closing = False
        self.error: BaseException | None = None
        api.has_controller = True
        api.log_of = lambda name: pod.log if (pod := self._pods.get(name)) else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for tests

    def wait_for_pod(self, *, printed: str) -> Pod:
        """A live pod that has printed this; of pods that end before, the next one is waited for."""

        def found() -> Pod | None:
            assert self.error is None, self.error
            live = [pod for pod in list(self._pods.values()) if pod.process.poll() is None]
            return next((pod for pod in live if printed in pod.printed), None)

        return wait_until(found, PATIENCE_SECONDS, f"a pod that prints {printed!r}")

    def evict(self, pod: Pod) -> None:
        """Take its node away."""
        self._put_condition(pod.name)
        pod.terminate()
        pod.process.wait(PATIENCE_SECONDS)

    def failed(self, job: str) -> int:
        """How many pods count as failures."""
        return int((self._api.objects.get("Job", job) or {}).get("status", {}).get("failed", 0))

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        for pod in self._pods.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()

    # ------------------------------------------------------------------ the controller

    def _run(self) -> None:
        try:
            while not self._closing:
                for job in self._api.objects.all("Job"):
                    self._sync(job)
                with self._api.objects.changed:
                    self._api.objects.changed.wait(_LOOK_SECONDS)
        except BaseException as error:  # a test that waits for a pod has to hear of it
            self.error = error
            raise

    def _sync(self, job: dict[str, Any]) -> None:
        name, spec, status = job["metadata"]["name"], job["spec"], dict(job["status"])
        for pod in self._of(name):
            if pod.name not in self._judged and (code := pod.look()) is not None:
                self._judged.add(pod.name)
                self._end_pod(pod.name, code)
                self._judge(spec, status, code, self._is_disrupted(pod.name))
        live = [pod for pod in self._of(name) if pod.name not in self._judged]
        is_over = bool(status.get("conditions"))
        going = job["metadata"].get("deletionTimestamp")
        if going or spec["suspend"]:
            for pod in live:
                pod.terminate()
        if going and not live:
            for pod in self._of(name):
                self._api.objects.remove("Pod", pod.name)
                del self._pods[pod.name]
            self._api.objects.remove("Job", name)
            return
        if not (live or is_over or going or spec["suspend"]):
            assert spec["podReplacementPolicy"] == "Failed", "the others are not simulated"
            live = [self._start(job)]
        terminating = sum(pod.killed_at is not None for pod in live)
        status |= {"active": len(live) - terminating, "terminating": terminating}
        if status != job["status"]:
            self._api.objects.change("Job", name, lambda old: old.update(status=status))

    def _judge(self, spec: Any, status: dict[str, Any], code: int, is_disrupted: bool) -> None:
        if code == 0:
            status["conditions"] = [{"type": "Complete", "status": "True"}]
            return
        action = _action(spec["podFailurePolicy"]["rules"], code, is_disrupted)
        if action == "Ignore":
            return
        status["failed"] = status.get("failed", 0) + 1
        reason = None
        if action == "FailJob":
            reason = "PodFailurePolicy"
        elif status["failed"] > spec["backoffLimit"]:
            reason = "BackoffLimitExceeded"
        if reason:
            status["conditions"] = [{"type": "Failed", "status": "True", "reason": reason}]

    # ------------------------------------------------------------------ the kubelet

    def _of(self, job: str) -> list[Pod]:
        return [pod for pod in self._pods.values() if pod.name.rpartition("-")[0] == job]

    def _start(self, job: dict[str, Any]) -> Pod:
        template, number = job["spec"]["template"], len(self.started)
        name = f"{job['metadata']['name']}-{number:05d}"
        disk, memory = self._node.folder / name, self._node.memory / name
        (container,) = template["spec"]["containers"]
        places = self._mount(template["spec"]["volumes"], container, disk, memory)
        environment = {
            "PATH": os.environ["PATH"],
            **{each["name"]: _moved(each["value"], places) for each in container["env"]},
        }
        program, *arguments = container["command"]
        assert program == "runner"
        log = self._node.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [RUNNER, *(_moved(argument, places) for argument in arguments)],
                cwd=self._node.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        grace = float(template["spec"]["terminationGracePeriodSeconds"])
        pod = self._pods[name] = Pod(name, self._node, process, disk, memory, log, grace)
        self.started.append(name)
        self._api.objects.put(
            "Pod",
            {
                "metadata": {
                    "name": name,
                    "creationTimestamp": now(),
                    "labels": template["metadata"]["labels"],
                },
                "spec": {"nodeName": "node"},
                "status": {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]},
            },
        )
        return pod

    def _mount(
        self, volumes: list[Any], container: Any, disk: Path, memory: Path
    ) -> dict[str, str]:
        """Where the paths of the container are on this machine."""
        by_name = {volume["name"]: volume for volume in volumes}
        places: dict[str, str] = {}
        for mount in container["volumeMounts"]:
            volume = by_name[mount["name"]]
            if "persistentVolumeClaim" in volume:
                folder = self._claims[volume["persistentVolumeClaim"]["claimName"]]
            else:
                in_memory = volume.get("emptyDir", {}).get("medium") == "Memory"
                folder = (memory if in_memory else disk) / mount["name"]
            folder.mkdir(parents=True, exist_ok=True)
            places[mount["mountPath"]] = str(folder)
        (config,) = (volume["configMap"]["name"] for volume in volumes if "configMap" in volume)
        content = self._api.objects.get("ConfigMap", config)
        assert content is not None, "the pod's ConfigMap is there before the pod"
        for name, text in content["data"].items():
            document = yaml.safe_load(text)
            document["store"] = _moved(document["store"], places)
            # A pod has a network of its own; all of these share one.
            document["metrics"] = {"port": 0, "host": "127.0.0.1"}
            (disk / "job" / name).write_text(yaml.safe_dump(document))
        return places

    def _is_disrupted(self, pod: str) -> bool:
        found = self._api.objects.get("Pod", pod)
        return found is not None and bool(found["status"].get("conditions"))

    def _put_condition(self, pod: str) -> None:
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "EvictionByEvictionAPI",
        }

        def change(body: dict[str, Any]) -> None:
            body["status"]["conditions"] = [condition]

        self._api.objects.change("Pod", pod, change)

    def _end_pod(self, pod: str, code: int) -> None:
        def change(body: dict[str, Any]) -> None:
            body["status"]["phase"] = "Failed" if code else "Succeeded"
            body["status"]["containerStatuses"] = [{"state": {"terminated": {"exitCode": code}}}]

        self._api.objects.change("Pod", pod, change)


def _action(rules: list[Any], code: int, is_disrupted: bool) -> str:
    """Of the first rule that matches; `Count` if none does."""
    for rule in rules:
        codes = rule.get("onExitCodes")
        if codes is not None and codes["operator"] == "In" and code in codes["values"]:
            return str(rule["action"])
        if is_disrupted and rule.get("onPodConditions"):
            return str(rule["action"])
    return "Count"


def _moved(text: str, places: dict[str, str]) -> str:
    """A path of the container as it is on this machine."""
    for path, folder in sorted(places.items(), reverse=True):
        if text == path or text.startswith(f"{path}/"):
            return folder + text[len(path) :]
    return text


@contextlib.contextmanager
def cluster_on(node: Node, api: KubeApi, claims: dict[str, Path]) -> Iterator[SimulatedCluster]:
    cluster = SimulatedCluster(node, api, claims)
    try:
        yield cluster
        assert cluster.error is None, cluster.error
    finally:
        cluster.close()
