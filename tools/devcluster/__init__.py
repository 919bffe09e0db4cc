"""A real Kubernetes for development and tests, built from its Go modules: no daemon, no registry, no root for the control plane.

`control_plane()` is etcd, API server and controller manager, for tests that need no pods; several run side by side.
`python -m devcluster up` is a whole node with containerd and kubelet, in namespaces of its own (needs root).
"""
