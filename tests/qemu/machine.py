"""A virtual machine with Debian's kernel and this machine's files, made in seconds and run without KVM."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

#: Of the kernel: the network and the host's files over virtio, and the NFS client.
MODULES = ("virtio_pci", "virtio_net", "9pnet_virtio", "9p", "nfsv4")

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read module; do insmod $module || echo "no $module"; done < /modules
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
mkdir -p /host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose host /host
for place in proc dev; do mount -o bind /$place /host/$place; done
mount -t sysfs sys /host/sys
mount -t tmpfs tmp /host/tmp
mount -t tmpfs run /host/run
mkdir /host/run/given
cp /given/* /host/run/given/
mkdir -p /dev/shm
mount -t tmpfs shm /dev/shm
stty -echo
chroot /host /bin/sh -c 'COMMAND'
poweroff -f
"""


class Image:
    """A kernel and a root file system in `folder`, from Debian's packages. Needs apt-get, dpkg, kmod and cpio."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._root = folder, folder / "root"
        self._root.mkdir(parents=True)
        depends = _output("apt-cache", "depends", "linux-image-amd64")
        kernel = next(line.split()[1] for line in depends.splitlines() if "Depends: linux-image" in line)
        _run("apt-get", "download", "-q", kernel, "busybox-static", folder=folder)
        for package in folder.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(self._root))
        self.version = kernel.removeprefix("linux-image-")
        _run("depmod", "-b", str(self._root), self.version)

    @property
    def kernel(self) -> Path:
        return self._root / "boot" / f"vmlinuz-{self.version}"

    def initrd(self, command: str, given: Sequence[Path]) -> Path:
        """One that runs a command on the host's files, with those that are `given` in /run/given, and ends."""
        tree = self.folder / "initrd"
        for name in ("bin", "proc", "dev", "given", "modules.d"):
            (tree / name).mkdir(parents=True)
        _copy(self._root / "bin" / "busybox", tree / "bin" / "busybox")
        names = []
        for module in self._modules():
            _copy(module, tree / "modules.d" / module.name)
            names.append(f"/modules.d/{module.name}\n")
        (tree / "modules").write_text("".join(names))
        for path in given:
            _copy(path, tree / "given" / path.name)
        init = tree / "init"
        init.write_text(_INIT.replace("COMMAND", command))
        init.chmod(0o755)
        packed = self.folder / "initrd.cpio"
        with packed.open("wb") as out:
            names_of = subprocess.run(["find", "."], cwd=tree, capture_output=True, check=True).stdout
            subprocess.run(
                [str(self._root / "bin" / "busybox"), "cpio", "-o", "-H", "newc"],
                cwd=tree, input=names_of, stdout=out, stderr=subprocess.DEVNULL, check=True,
            )  # fmt: skip
        return packed

    def _modules(self) -> list[Path]:
        """With what they need, in order, each once."""
        found: dict[Path, None] = {}
        for name in MODULES:
            told = _output("modprobe", "-d", str(self._root), "-S", self.version, "--show-depends", name)
            found |= dict.fromkeys(Path(line.split()[1]) for line in told.splitlines() if line.startswith("insmod"))
        return list(found)

    def start(self, initrd: Path, memory_mib: int = 2048) -> "subprocess.Popen[str]":
        """The machine, its console on stdin and stdout."""
        command = [
            "qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", str(memory_mib),
            "-kernel", str(self.kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
            "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
            "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n",
            "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ]  # fmt: skip
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace")


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    target.chmod(0o755)


def _run(*command: str, folder: Path | None = None) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
