// Package boot is what the agent does as the first process of a machine, up to
// the point where it can serve: mount what the kernel offers, load the modules
// that the initrd carries, mount the root disk and make it the root.
//
// In mode fast the agent then stays process 1 for the life of the machine. In
// mode image it starts a second copy of itself aside and turns process 1 over
// to the image's own init. [PowerOff] is the way back.
//
// Reaping, the link and all services are other packages' business.
//
// Invariants:
//   - The root disk belongs to the workspace's user and is hostile: nothing on
//     it is read before it is the root, so that no link on it can lead outside,
//     and nothing on it decides whether the agent comes up.
//   - Only the root disk, /proc, /sys and /dev are worth failing for; what else
//     goes wrong is one line on the console.
//   - A boot that cannot go on says why in its last line and ends the machine,
//     so that the host sees a machine that ended and not one that is silent.
package boot

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Mode is who process 1 will be.
type Mode string

// The modes.
const (
	Fast  Mode = "fast"  // the agent
	Image Mode = "image" // the image's own init
)

// Link is the byte channel that the host listens on.
type Link string

// The links.
const (
	Serial Link = "serial"
	Vsock  Link = "vsock"
)

const (
	// rootDevice is where the root disk always is: the first virtio-blk.
	rootDevice = "/dev/vda"
	rootFSType = "ext4"
	// rootWait bounds the wait for the disk's device node. The node is there as
	// soon as the driver is, built in or loaded; the wait is for slow hosts.
	rootWait = 10 * time.Second
	// devicePoll is short against a boot and long against one look (10 µs).
	devicePoll = time.Millisecond

	newRoot     = "/newroot"
	modulesList = "/modules/list"
	modulesDir  = "/modules"
)

// System is a machine whose root is mounted.
type System struct {
	Cmdline Cmdline
	// Started is CLOCK_BOOTTIME when the agent's first code ran.
	Started time.Duration

	// initramfs is a descriptor of the directory that the kernel unpacked the
	// initrd into; nothing else reaches it once the root is switched.
	initramfs int
	log       *slog.Logger
}

// Up takes process 1 from the kernel's hands to a machine with its root
// mounted and everything that programs expect mounted on it. started is
// [Uptime] as early as the caller could take it. On an error the machine cannot
// be used: see [Die].
func Up(ctx context.Context, started time.Duration, log *slog.Logger) (*System, error) {
	s := &System{Started: started, initramfs: -1, log: log}
	for _, m := range []mountPoint{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	} {
		if err := m.mount(); err != nil {
			return nil, err
		}
	}
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	if s.Cmdline, err = ParseCmdline(string(text)); err != nil {
		return nil, err
	}
	if err := loadModules(modulesDir, modulesList, s.Cmdline.Link, log); err != nil {
		return nil, err
	}
	if err := waitDevice(ctx, rootDevice, rootWait); err != nil {
		return nil, err
	}
	if err := s.switchRoot(); err != nil {
		return nil, err
	}
	if err := s.populate(); err != nil {
		return nil, err
	}
	return s, nil
}

// Mode is what the kernel command line asked for.
func (s *System) Mode() Mode { return s.Cmdline.Init }

// waitDevice waits until path is a block device.
func waitDevice(ctx context.Context, path string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(devicePoll)
	defer tick.Stop()
	for {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = errors.New("not a block device")
			}
			return fmt.Errorf("wait for root disk %s: gave up after %v: %w", path, limit, err)
		case <-tick.C:
		}
	}
}

// Uptime is CLOCK_BOOTTIME: the time since the kernel started, by the guest's
// own clock.
func Uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// Die is the end of a boot that cannot go on: the reason as the console's last
// line, then the machine ends. Outside process 1 it exits.
func Die(log *slog.Logger, err error) {
	log.Error("cannot boot: " + err.Error())
	if os.Getpid() == 1 {
		unix.Sync()
		if err := endMachine(); err != nil {
			log.Error("cannot end the machine: " + err.Error())
		}
	}
	os.Exit(1)
}
