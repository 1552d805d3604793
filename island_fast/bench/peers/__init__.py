"""What people would use instead, each as it is used: restic, borg, Cinder's own driver, qemu's tools."""
