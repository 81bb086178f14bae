"""Runs as Jobs in a Kubernetes cluster.

    profiles   what the spot nodes of the clouds need, and what they really give
    names      what a run's objects are called, and the labels that they bear
    pod        the pod of a run: pure
    objects    a job file → the Job and the ConfigMap of a run: pure
    state      what a Job and its pods say of a run: pure
    answers    what the API is asked for, and what its refusals mean: pure
    client     the API: few verbs, and errors that say what to do; the only user of the library
    reading    a run's log across pods
    control    create, replace, suspend, follow: the steps of submit, stop and wait

A supervisor in a pod knows nothing of all this: it is `runner run` with a process for a trainer.
"""
