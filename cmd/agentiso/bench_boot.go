package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/image"
	"github.com/agentiso/agentiso/internal/image/kernel"
	"github.com/agentiso/agentiso/internal/measure"
)

// The cases of `bench boot`.
const (
	leanFast   = "lean-fast"
	debianFast = "debian-fast"
	stockBoot  = "stock"
)

// stockKernel is what the stock image's own kernel is called in the
// benchmark's private store.
const stockKernel = "stock"

// bootCase is one way to boot: what QEMU loads, and over which image.
type bootCase struct {
	name  string
	n     int
	boot  domain.Boot
	image domain.Image
	init  string
}

// benchBoot measures cold boots: from QEMU's start to the agent's first
// answer. Cases take turns, so that a busy moment of the host falls on all.
// The stock case boots the distribution's kernel with its own initramfs and
// systemd, with the agent as one of its services; it is the contrast.
func benchBoot(ctx context.Context, e *benchEnv, n, stockN int, tick func(string)) ([]measure.Result, error) {
	cases, err := bootCases(ctx, e, n, stockN)
	if err != nil {
		return nil, err
	}
	s := measure.New("boot")
	for i := range max(n, stockN) {
		for _, c := range cases {
			if i >= c.n {
				continue
			}
			tick(fmt.Sprintf("%s %d/%d", c.name, i+1, c.n))
			took, err := e.coldBoot(ctx, c)
			if err != nil {
				return nil, fmt.Errorf("boot %s: %w", c.name, err)
			}
			s.AddDuration(c.name, "ready_ms", took)
		}
	}
	return s.Results(stockBoot), nil
}

func bootCases(ctx context.Context, e *benchEnv, n, stockN int) ([]bootCase, error) {
	dev, err := e.d.images.Image(ctx, "dev")
	if err != nil {
		return nil, err
	}
	lean, err := e.d.kernels.Boot(ctx, kernel.LeanName)
	if err != nil {
		return nil, err
	}
	debian, err := e.distroKernel(ctx)
	if err != nil {
		return nil, err
	}
	stock, err := e.d.images.Image(ctx, stockBoot)
	if err != nil {
		return nil, err
	}
	boot, err := e.stock(ctx)
	if err != nil {
		return nil, err
	}
	return []bootCase{
		{leanFast, n, lean, dev, "fast"},
		{debianFast, n, debian, dev, "fast"},
		{stockBoot, stockN, boot, stock, "image"},
	}, nil
}

// distroKernel is the kernel that `agentiso kernel fetch` made.
func (e *benchEnv) distroKernel(ctx context.Context) (domain.Boot, error) {
	all, _, err := e.d.kernels.Kernels(ctx)
	if err != nil {
		return domain.Boot{}, err
	}
	for _, k := range all {
		if k.Name != kernel.LeanName && k.Name != stockKernel {
			return e.d.kernels.Boot(ctx, k.Name)
		}
	}
	return domain.Boot{}, fault.New(fault.NotFound, "there is no kernel of the distribution").WithNext("Run `agentiso kernel fetch`.")
}

// stock is the boot of the stock image: its own kernel, its own initramfs.
func (e *benchEnv) stock(ctx context.Context) (domain.Boot, error) {
	vmlinuz, err := e.d.images.Extra(ctx, stockBoot, "vmlinuz")
	if err != nil {
		return domain.Boot{}, err
	}
	initrd, err := e.d.images.Extra(ctx, stockBoot, "initrd.img")
	if err != nil {
		return domain.Boot{}, err
	}
	k, err := e.d.kernels.Import(ctx, stockKernel, vmlinuz, false)
	if err != nil {
		return domain.Boot{}, err
	}
	k.NeedsACPI = true
	return domain.Boot{Kernel: k, Initrd: initrd, Append: "root=/dev/vda rw quiet"}, nil
}

// benchID is the one machine that a boot benchmark has at a time.
const benchID = "bench000"

// coldBoot boots once and returns the time from QEMU's start to the agent's
// first answer; disk and clean-up are not in it.
func (e *benchEnv) coldBoot(ctx context.Context, c bootCase) (_ time.Duration, err error) {
	uid, _ := e.d.cfg.MachineUIDs()
	slot, err := e.d.networks.Attach(ctx, benchID, domain.NetworkPolicy{}, domain.NetworkSlot{})
	if err != nil {
		return 0, err
	}
	disk, err := e.d.disks.Create(ctx, benchID, c.image.Disk, c.image.Disk.SizeBytes)
	if err != nil {
		return 0, err
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		err = errors.Join(err, e.d.machines.Kill(ctx, benchID), e.d.disks.Remove(ctx, benchID), e.d.machines.RemoveConsole(benchID))
	}()
	if err := e.d.disks.Own(ctx, benchID, uid); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	began := time.Now()
	p, err := e.d.machines.Start(ctx, domain.MachineSpec{
		ID: benchID, Boot: c.boot, Init: c.init, CPUs: 1, MemoryMiB: 512,
		Disk: disk, Slot: slot, Link: domain.LinkSerial, UID: uid,
	})
	if err != nil {
		return 0, err
	}
	if err := agentAnswers(ctx, p.Endpoint); err != nil {
		tail := strings.TrimSpace(string(e.d.machines.Tail(benchID, 1<<10)))
		return 0, fmt.Errorf("the agent did not answer: %w; console:\n%s", err, tail)
	}
	return time.Since(began), nil
}

// stockFiles put the agent into the stock image as a service, as a product
// would that installs its agent into images.
func stockFiles(agent string) ([]image.File, error) {
	program, err := os.ReadFile(agent)
	if err != nil {
		return nil, fmt.Errorf("read guest agent: %w", err)
	}
	const unit = `[Unit]
Description=agentiso guest agent
DefaultDependencies=no
After=sysinit.target dev-virtio\x2dports-agent.device
Wants=dev-virtio\x2dports-agent.device

[Service]
ExecStart=@/usr/lib/agentiso/agentiso-guest @agentiso-guest
Restart=on-failure

[Install]
WantedBy=multi-user.target
`
	return []image.File{
		{Path: "usr/lib/agentiso/agentiso-guest", Mode: 0o755, Data: program},
		{Path: "etc/systemd/system/agentiso-guest.service", Data: []byte(unit)},
		{Path: "etc/systemd/system/multi-user.target.wants/agentiso-guest.service", Target: "../agentiso-guest.service"},
	}, nil
}
