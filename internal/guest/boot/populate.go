package boot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// mounts is what every machine has, in order. The first three are needed by
// the agent itself. devtmpfs and the rest are what systemd would mount, so that
// an init which finds them does not mount them again.
var mounts = []struct {
	mountPoint
	required bool
}{
	{mountPoint{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""}, true},
	{mountPoint{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""}, true},
	{mountPoint{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"}, true},
	{mountPoint{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"}, false},
	{mountPoint{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"}, false},
	{mountPoint{"mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""}, false},
}

const (
	cgroupRoot = "/sys/fs/cgroup"
	// defaultPath is Debian's for root; images that want another say so in
	// their environment.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

// populate mounts on the new root what programs expect there, and in mode fast
// does what else an init would have done before the first program.
//
// /tmp stays on the disk, with nothing mounted over it: people unpack and build
// there, and a tmpfs would take that from the machine's few hundred megabytes
// of memory. It also survives stop and start, as files that an agent left
// behind are expected to.
func (s *System) populate() error {
	for _, m := range mounts {
		if err := m.mount(); err != nil {
			if m.required {
				return err
			}
			s.log.Warn("prepare root", "err", err)
		}
	}
	steps := []func() error{mountRun(s.Mode() == Fast), deviceLinks, tmpDir, loopbackUp}
	if s.Mode() == Fast {
		steps = append(steps, deviceModes, cgroups, func() error { return writeSysctls(sysctlRoot, sysctls) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			s.log.Warn("prepare root", "err", err)
		}
	}
	return os.Setenv("PATH", defaultPath)
}

// mountRun mounts a tmpfs on /run, so that no pid file or socket outlives its
// process. Container images ship directories there that their programs count on
// (/run/mysqld, owned by mysql), and no service manager will make those anew:
// with skeleton, directories and links are carried over.
func mountRun(skeleton bool) func() error {
	return func() error {
		var sk []node
		if skeleton {
			sk = readSkeleton("/run")
		}
		m := mountPoint{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"}
		if err := m.mount(); err != nil {
			return err
		}
		return writeSkeleton("/run", sk)
	}
}

// deviceLinks makes the links that udev would; devtmpfs has only nodes.
func deviceLinks() error {
	for _, l := range [][2]string{
		{"/proc/self/fd", "/dev/fd"},
		{"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"},
		{"/proc/self/fd/2", "/dev/stderr"},
	} {
		if err := os.Symlink(l[0], l[1]); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// deviceModes opens to every user the devices that udev's rules open: the
// kernel checks each use of them on its own.
func deviceModes() error {
	for _, dev := range []string{"/dev/fuse", "/dev/net/tun"} {
		if err := os.Chmod(dev, 0o666); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func tmpDir() error {
	err := os.Mkdir("/tmp", 0o1777)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Chmod("/tmp", 0o1777|os.ModeSticky)
}

// loopbackUp sets lo up, which gives it 127.0.0.1 and ::1.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// cgroups mounts cgroup2 and enables every controller the kernel has for the
// first level, so that a container runtime can use them at once.
func cgroups() error {
	m := mountPoint{"cgroup2", cgroupRoot, "cgroup2",
		unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "nsdelegate"}
	if err := m.mount(); err != nil {
		return err
	}
	text, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range strings.Fields(string(text)) {
		// One write each: a controller that cannot be enabled must not keep
		// the others off.
		err := os.WriteFile(cgroupRoot+"/cgroup.subtree_control", []byte("+"+c), 0)
		if err != nil {
			errs = append(errs, fmt.Errorf("enable cgroup controller %s: %w", c, err))
		}
	}
	return errors.Join(errs...)
}
