"""Model stores over NFS: where one is exported, where it is mounted here, and a client for kernels that have none."""
