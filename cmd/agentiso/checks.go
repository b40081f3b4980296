package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/qemu"
	"github.com/agentiso/agentiso/internal/server"
)

// lowSpace is where doctor begins to warn: an image build of dev-full and a
// few workspaces need about as much.
const lowSpace = 5 << 30

// hostChecks looks at what agentiso needs of the host, with or without a
// daemon.
func hostChecks(ctx context.Context, cfg *config.Config) []server.Check {
	checks := []server.Check{qemuCheck(ctx, cfg)}
	for _, t := range []struct{ program, pkg, use string }{
		{"dpkg-deb", "dpkg", "`agentiso kernel fetch` and `image build minimal`"},
		{"mmdebstrap", "mmdebstrap", "`agentiso image build dev`"},
	} {
		c := server.Check{Name: t.program, Verdict: server.OK}
		path, err := exec.LookPath(t.program)
		c.Detail = path
		if err != nil {
			c.Verdict, c.Detail = server.Warn, "not found; "+t.use+" needs it"
			c.Next = "Install it: apt-get install " + t.pkg + "."
		}
		checks = append(checks, c)
	}
	if _, err := guestAgent(); err != nil {
		checks = append(checks, faultCheck("guest agent", err))
	}
	checks = append(checks, spaceCheck(cfg))
	if os.Geteuid() != 0 {
		checks = append(checks, subordinateCheck())
	}
	return append(checks, identityCheck(cfg), networkCheck(cfg))
}

func qemuCheck(ctx context.Context, cfg *config.Config) server.Check {
	b, err := qemu.Find(ctx, cfg.VM.QEMUBinary)
	if err != nil {
		return faultCheck("qemu", err)
	}
	return server.Check{Name: "qemu", Verdict: server.OK, Detail: fmt.Sprintf("%s, version %s", b.Path, b.Version)}
}

func spaceCheck(cfg *config.Config) server.Check {
	c := server.Check{Name: "disk space", Verdict: server.OK}
	dir := cfg.Server.DataDir
	var st unix.Statfs_t
	for unix.Statfs(dir, &st) != nil && dir != "/" {
		dir = dir[:max(strings.LastIndexByte(dir, '/'), 1)]
	}
	free := int64(st.Bavail) * st.Bsize //nolint:gosec // a count of blocks
	c.Detail = fmt.Sprintf("%.1f GiB free for %s", float64(free)/(1<<30), cfg.Server.DataDir)
	if free < lowSpace {
		c.Verdict = server.Warn
		c.Next = "Make room, or set server.data_dir to a larger file system: guests are held when the disk is full."
	}
	return c
}

// subordinateCheck: an ordinary user's mmdebstrap unpacks in a user namespace
// with ids of /etc/subuid.
func subordinateCheck() server.Check {
	c := server.Check{Name: "subordinate ids", Verdict: server.OK, Detail: "/etc/subuid names this user"}
	u, err := user.Current()
	if err != nil {
		return faultCheck(c.Name, err)
	}
	ids, err := os.ReadFile("/etc/subuid")
	if err != nil || !(bytes.HasPrefix(ids, []byte(u.Username+":")) || bytes.Contains(ids, []byte("\n"+u.Username+":"))) {
		c.Verdict, c.Detail = server.Warn, "/etc/subuid does not name "+u.Username+"; `agentiso image build dev` may need it"
		c.Next = "As root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 " + u.Username + "."
	}
	return c
}

func identityCheck(cfg *config.Config) server.Check {
	c := server.Check{Name: "machine users", Verdict: server.OK}
	base, count := cfg.MachineUIDs()
	switch {
	case count > 0:
		c.Detail = fmt.Sprintf("every machine runs as a Unix user of its own, %d to %d", base, base+count-1)
	case os.Geteuid() == 0:
		c.Verdict, c.Detail = server.Warn, "machines run as root"
		c.Next = "Set vm.uid_base to the first of a range of unused user ids."
	default:
		c.Detail = "machines run as this user, confined by QEMU's seccomp filter"
	}
	return c
}

func networkCheck(cfg *config.Config) server.Check {
	c := server.Check{Name: "network", Verdict: server.OK, Detail: "driver " + cfg.Network.Driver + ", no access unless asked for"}
	if _, count := cfg.MachineUIDs(); count == 0 {
		c.Verdict = server.Warn
		c.Detail += "; with --internet a guest also reaches this host's loopback services and its private networks"
		c.Next = "Run the daemon as root, where a packet filter keeps guests to public addresses, or do not use --internet with code you do not trust."
	} else if _, err := exec.LookPath("nft"); err != nil {
		c.Verdict = server.Warn
		c.Detail += "; nft is missing, so --internet is refused"
		c.Next = "Install it: apt-get install nftables."
	}
	return c
}

// checks looks at what the daemon has: kernel, image, and with both of them
// the accelerator.
func (d *daemon) checks(ctx context.Context) []server.Check {
	kernelCheck := server.Check{Name: "kernel", Verdict: server.OK}
	boot, kerr := d.kernels.Boot(ctx, nameOnly(d.cfg.VM.Kernel))
	if kerr != nil {
		kernelCheck = faultCheck("kernel", kerr)
	} else {
		kernelCheck.Detail = fmt.Sprintf("%s (%s)", boot.Kernel.Name, boot.Kernel.Release)
	}
	imageCheck := server.Check{Name: "default image", Verdict: server.OK}
	img, ierr := d.images.Image(ctx, "")
	if ierr != nil {
		imageCheck = faultCheck("default image", ierr)
	} else {
		imageCheck.Detail = fmt.Sprintf("%s (%.19s)", d.cfg.Images.DefaultImage, img.Digest)
	}
	checks := []server.Check{kernelCheck, imageCheck}
	if kerr != nil || ierr != nil {
		return checks
	}
	return append(checks, d.accelCheck(ctx, boot, img))
}

func (d *daemon) accelCheck(ctx context.Context, boot domain.Boot, img domain.Image) server.Check {
	const name = "accelerator"
	base, _ := d.cfg.MachineUIDs()
	v, err := d.machines.Accel(ctx, domain.MachineSpec{
		ID: "doctor", Boot: boot, Init: "fast", CPUs: 1, MemoryMiB: 256, Disk: img.Disk,
		Slot: domain.NetworkSlot{Driver: "user", MAC: "02:00:00:00:00:01", Restrict: true},
		Link: domain.LinkSerial, UID: base,
	})
	if err != nil {
		return faultCheck(name, err)
	}
	c := server.Check{Name: name, Verdict: server.OK, Detail: v.Accel + ": " + v.Reason, Next: v.Next}
	if v.Accel != qemu.KVM {
		c.Verdict = server.Warn
		c.Detail += " (everything works, guests run several times slower)"
	}
	return c
}
