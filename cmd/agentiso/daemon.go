package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/image"
	"github.com/agentiso/agentiso/internal/image/kernel"
	"github.com/agentiso/agentiso/internal/link"
	"github.com/agentiso/agentiso/internal/network/usernet"
	"github.com/agentiso/agentiso/internal/qemu"
	"github.com/agentiso/agentiso/internal/state"
	"github.com/agentiso/agentiso/internal/storage/qcow2"
	"github.com/agentiso/agentiso/internal/telemetry"
	"github.com/agentiso/agentiso/internal/workspace"
)

// daemon is every part of the running system, wired. Its parts are closed by
// close in the reverse order of their making.
type daemon struct {
	cfg        *config.Config
	log        *slog.Logger
	telemetry  *telemetry.Telemetry
	images     *image.Store
	kernels    *kernel.Store
	disks      *qcow2.Store
	networks   *usernet.Driver
	links      *link.Hub
	machines   *qemu.Owner
	workspaces *workspace.Service

	closers []closer
}

type closer struct {
	name string
	fn   func() error
}

// stores answers for images and kernels together.
type stores struct {
	*image.Store
	kernels *kernel.Store
}

// Boot implements workspace.Images.
func (s stores) Boot(ctx context.Context, name string) (domain.Boot, error) {
	return s.kernels.Boot(ctx, name)
}

// testRecorder wraps the recorder of operations' steps; tests set it to crash
// the daemon at one.
var testRecorder = func(r workspace.Recorder) workspace.Recorder { return r }

// assemble makes the daemon's parts and recovers what an earlier daemon left.
// The data directory is locked until close.
func assemble(ctx context.Context, cfg *config.Config, log *slog.Logger) (_ *daemon, err error) {
	d := &daemon{cfg: cfg, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if err := cfg.MakeDirs(); err != nil {
		return nil, err
	}
	if err := d.lock(); err != nil {
		return nil, err
	}
	agent, err := guestAgent()
	if err != nil {
		return nil, err
	}
	d.telemetry, err = telemetry.New(ctx, telemetry.Options{Version: version, Log: log})
	if err != nil {
		return nil, err
	}
	d.onClose("telemetry", d.telemetry.Close)

	data := func(name string) string { return filepath.Join(cfg.Server.DataDir, name) }
	records, err := state.Open(ctx, state.Options{Path: data("state.db"), Log: log})
	if err != nil {
		return nil, err
	}
	d.onClose("records", records.Close)
	d.disks, err = qcow2.Open(qcow2.Options{Dir: data("disks"), Log: log})
	if err != nil {
		return nil, err
	}
	d.onClose("disks", d.disks.Close)
	d.images, err = image.Open(image.Options{
		Dir: data("images"), Default: cfg.Images.DefaultImage, Log: log,
		RecipeFiles: map[string]func() ([]image.File, error){stockBoot: func() ([]image.File, error) { return stockFiles(agent) }},
	})
	if err != nil {
		return nil, err
	}
	d.onClose("images", d.images.Close)
	d.kernels, err = kernel.Open(kernel.Options{
		Dir: data("kernels"), AgentPath: agent, KernelPath: pathOnly(cfg.VM.Kernel), InitrdPath: cfg.VM.Initrd, Log: log,
	})
	if err != nil {
		return nil, err
	}
	uidBase, uidCount := cfg.MachineUIDs()
	d.networks, err = usernet.New(usernet.Options{
		Subnet: cfg.Network.Subnet, DNS: cfg.Network.DNS, AllowPrivate: cfg.Network.AllowPrivate,
		UIDBase: uidBase, UIDCount: uidCount, Log: log,
	})
	if err != nil {
		return nil, err
	}
	d.links = link.NewHub(link.Options{Log: log, Boot: cfg.VM.BootTimeout})
	d.onClose("links", func() error { d.links.Shutdown(); return nil })
	d.machines, err = qemu.NewOwner(qemu.Options{
		RunDir: cfg.Server.RunDir, ConsoleDir: data("consoles"), StateDir: cfg.Server.DataDir,
		Binary: cfg.VM.QEMUBinary, Accel: cfg.VM.Accel, Ready: agentAnswers, Log: log,
	})
	if err != nil {
		return nil, err
	}
	d.onClose("machines", d.machines.Close)

	r := cfg.Resources
	d.workspaces = workspace.New(workspace.Options{
		Disks: d.disks, Networks: d.networks, Images: stores{d.images, d.kernels}, Machines: d.machines, Pauses: d.machines,
		Consoles: d.machines, Guests: d.links, Records: records, Recorder: testRecorder(d.telemetry.Recorder()),
		Limits: workspace.Limits{
			MaxWorkspaces: r.MaxWorkspaces,
			DefaultCPUs:   r.DefaultVCPUs, MaxCPUs: r.MaxVCPUs,
			DefaultMemoryMiB: r.DefaultMemoryMiB, MaxMemoryMiB: r.MaxMemoryMiB,
			DefaultDiskBytes: r.DefaultDiskGiB << 30, MaxDiskBytes: r.MaxDiskGiB << 30,
		},
		DefaultKernel: nameOnly(cfg.VM.Kernel), DefaultInit: cfg.VM.Init, Link: domain.LinkKind(cfg.VM.Link),
		BootTimeout: cfg.VM.BootTimeout, UIDBase: uidBase, UIDCount: uidCount,
		KeepStrays: records.Created(), Log: log,
	})
	if err := d.workspaces.Recover(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *daemon) onClose(name string, fn func() error) {
	d.closers = append(d.closers, closer{name, fn})
}

// close lets go of everything; machines run on.
func (d *daemon) close() error {
	var errs []error
	for i := len(d.closers) - 1; i >= 0; i-- {
		if err := d.closers[i].fn(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", d.closers[i].name, err))
		}
	}
	d.closers = nil
	return errors.Join(errs...)
}

// lock takes the data directory and the run directory for this process: two
// daemons over one would undo each other's work.
func (d *daemon) lock() error {
	for _, dir := range []string{d.cfg.Server.DataDir, d.cfg.Server.RunDir} {
		path := filepath.Join(dir, "daemon.lock")
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return fmt.Errorf("lock %s: %w", dir, err)
		}
		d.onClose("lock of "+dir, f.Close)
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return fmt.Errorf("lock %s: %w", dir, err)
			}
			return fault.New(fault.InUse, "another agentiso daemon uses %s", dir).
				WithNext("Use that one, stop it with `agentiso down`, or set server.data_dir and server.run_dir to directories of this daemon's own.")
		}
	}
	return nil
}

// pathOnly returns s if it is a path and not the name of a kernel.
func pathOnly(s string) string {
	if filepath.IsAbs(s) {
		return s
	}
	return ""
}

func nameOnly(s string) string {
	if filepath.IsAbs(s) {
		return ""
	}
	return s
}

// agentName is the guest agent's file name.
const agentName = "agentiso-guest"

// guestAgent finds the agent's binary of this build: beside this program, in
// ../lib/agentiso, or where AGENTISO_GUEST_BINARY says.
func guestAgent() (string, error) {
	if path := os.Getenv("AGENTISO_GUEST_BINARY"); path != "" {
		return filepath.Abs(path)
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find the guest agent: %w", err)
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", fmt.Errorf("find the guest agent: %w", err)
	}
	dir := filepath.Dir(self)
	for _, path := range []string{filepath.Join(dir, agentName), filepath.Join(dir, "..", "lib", "agentiso", agentName)} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fault.New(fault.Missing, "the guest agent %s is not beside %s", agentName, self).
		WithNext("Build both programs with `make build`, or install them with `make install`.")
}

// agentAnswers returns nil once the agent behind ep answers; it is what the
// accelerator probe waits for.
func agentAnswers(ctx context.Context, ep domain.Endpoint) error {
	hub := link.NewHub(link.Options{})
	defer hub.Shutdown()
	if err := hub.Open("probe", ep); err != nil {
		return err
	}
	defer hub.Close("probe")
	c := guestv1connect.NewGuestClient(&http.Client{Transport: hub.Transport("probe")}, "http://guest",
		connect.WithReadMaxBytes(4<<10), connect.WithAcceptCompression("gzip", nil, nil))
	_, err := c.Info(ctx, connect.NewRequest(&guestv1.InfoRequest{}))
	return err
}
