package qemu

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
)

// defaultProbeLimit is how long a guest may take to come up under KVM, where a boot
// takes well under a second. A host whose /dev/kvm opens and answers, but whose
// guests hang at 100 % system time, has been met.
const defaultProbeLimit = 5 * time.Second

// probed returns the verdict on spec's kernel, from memory or from a probe.
func (o *Owner) probed(ctx context.Context, spec domain.MachineSpec) (Verdict, error) {
	build, err := o.binary.find(ctx)
	if err != nil {
		return Verdict{}, err
	}
	kernel, err := kernelKey(spec.Boot.Kernel)
	if err != nil {
		return Verdict{}, err
	}
	a := o.accel
	if v, ok := a.recall(kernel, build.Key()); ok {
		return v, nil
	}
	select {
	case a.probing <- struct{}{}:
	case <-ctx.Done():
		return Verdict{}, ctx.Err()
	}
	defer func() { <-a.probing }()
	if v, ok := a.recall(kernel, build.Key()); ok { // found while we waited
		return v, nil
	}
	v, err := o.probe(ctx, build, spec)
	if err != nil {
		return Verdict{}, err
	}
	v.Kernel, v.QEMU = kernel, build.Key()
	if v.BootID, err = bootID(); err != nil {
		return Verdict{}, err
	}
	o.log.Info("accelerator decided", "accel", v.Accel, "reason", v.Reason, "dur", v.Took)
	if err := a.remember(v); err != nil {
		o.log.Warn("keep accelerator verdict", "err", err) // it holds until the daemon ends
	}
	return v, nil
}

var errGuestEnded = errors.New("a guest under KVM ended before its agent answered")

// probe boots a guest like spec's under KVM and asks whether its agent answers.
// The guest has no network, the serial link and a disk whose changes are thrown
// away; its process is gone when probe returns. An error means that nothing was
// learnt: ctx ended, or the machine would not start under TCG either.
func (o *Owner) probe(ctx context.Context, build Build, spec domain.MachineSpec) (Verdict, error) {
	v := Verdict{Accel: TCG, CheckedAt: time.Now()}
	spec.ID = "p" + strings.ToLower(rand.Text()[:7])
	spec.CPUs = 1
	spec.Link, spec.CID = domain.LinkSerial, 0
	spec.Slot = domain.NetworkSlot{Driver: "user", MAC: "52:54:00:00:00:01", Restrict: true}
	limited, cancel := context.WithTimeout(ctx, o.opts.probeLimit)
	defer cancel()
	r, err := o.launch(limited, build, spec, Launch{RunDir: string(o.probeDir(spec.ID)), Accel: KVM, Scratch: true})
	if err == nil {
		err = awaitReady(limited, r, o.opts.Ready)
		if derr := r.discard(); derr != nil {
			return Verdict{}, fmt.Errorf("end the machine that tried KVM: %w", derr)
		}
	} else if limited.Err() == nil && !kvmFailed(err) {
		return Verdict{}, fmt.Errorf("try KVM: %w", err)
	}
	v.Took = time.Since(v.CheckedAt)
	switch {
	case err == nil:
		v.Accel = KVM
		v.Reason = fmt.Sprintf("a guest came up under KVM in %v", v.Took.Round(time.Millisecond))
	case ctx.Err() != nil:
		return Verdict{}, ctx.Err()
	case limited.Err() != nil:
		v.Reason = fmt.Sprintf("a guest under KVM did not answer within %v", o.opts.probeLimit)
		v.Next = "The host's virtualization hangs, as it can inside another virtual machine; agentiso works without it, more slowly."
	default:
		v.Reason = err.Error()
		v.Next = "The kernel log of the host may say more; agentiso works without KVM, more slowly."
	}
	return v, nil
}

// kvmFailed reports whether a QEMU that did not start blames KVM. Its words go
// from "Could not access KVM kernel module" to failed assertions in
// target/i386/kvm/kvm.c, seen where the host itself is a virtual machine.
func kvmFailed(err error) bool {
	return strings.Contains(strings.ToLower(err.Error()), "kvm")
}

// awaitReady returns nil once the agent of r answers, and else why it will not.
// It closes r's console.
func awaitReady(ctx context.Context, r *running, ready func(context.Context, domain.Endpoint) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	defer r.console.Close()
	wg.Go(func() { _, _ = io.Copy(io.Discard, r.console) }) // unread, it would hold the guest up
	wg.Go(func() {
		if endWait(ctx, r.handle) {
			cancel(errGuestEnded)
		}
	})
	err := ready(ctx, r.process.Endpoint)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// sweepProbes ends what probes of an earlier daemon have left.
func (o *Owner) sweepProbes(ctx context.Context) error {
	entries, err := os.ReadDir(o.probesDir())
	if err != nil {
		return fmt.Errorf("sweep probes: %w", err)
	}
	for _, e := range entries {
		if err := endStrays(ctx, o.probesDir(), e.Name()); err != nil {
			return fmt.Errorf("sweep probes: %w", err)
		}
		if err := o.probeDir(e.Name()).remove(); err != nil {
			return fmt.Errorf("sweep probes: %w", err)
		}
	}
	return nil
}
