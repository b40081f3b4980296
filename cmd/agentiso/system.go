package main

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/server"
)

// system answers for the daemon as a whole. It implements server.System.
type system struct {
	d         *daemon
	startedAt time.Time

	once  sync.Once
	asked chan shutdown // receives one, when somebody asks for the end
}

// shutdown is how the daemon was asked to end.
type shutdown struct{ stopMachines bool }

func newSystem(d *daemon) *system {
	return &system{d: d, startedAt: time.Now(), asked: make(chan shutdown, 1)}
}

// Info implements server.System.
func (s *system) Info(ctx context.Context) (server.Info, error) {
	c := s.d.cfg
	i := server.Info{
		Version: version, PID: os.Getpid(), StartedAt: s.startedAt,
		DataDir: c.Server.DataDir, RunDir: c.Server.RunDir, ConfigFile: c.File,
		StorageDriver: c.Storage.Driver, NetworkDriver: c.Network.Driver,
		DefaultImage: c.Images.DefaultImage, MaxWorkspaces: c.Resources.MaxWorkspaces,
		Accelerator: s.accelerator(),
	}
	if b, err := s.d.machines.Version(ctx); err == nil {
		i.QEMUVersion = b.Version
	}
	if boot, err := s.d.kernels.Boot(ctx, nameOnly(c.VM.Kernel)); err == nil {
		i.DefaultKernel = boot.Kernel.Name
	}
	return i, nil
}

// accelerator is what machines get as far as it is known: without having
// booted one, auto is not.
func (s *system) accelerator() string {
	if a := s.d.cfg.VM.Accel; a != "auto" {
		return a
	}
	accel := "auto"
	for _, v := range s.d.machines.Verdicts() {
		accel = v.Accel
	}
	return accel
}

// Doctor implements server.System.
func (s *system) Doctor(ctx context.Context, probe bool) ([]server.Check, error) {
	if probe {
		if err := s.d.machines.ForgetVerdicts(); err != nil {
			return nil, err
		}
	}
	checks := hostChecks(ctx, s.d.cfg)
	return append(checks, s.d.checks(ctx)...), nil
}

// Shutdown implements server.System.
func (s *system) Shutdown(stopMachines bool) {
	s.once.Do(func() { s.asked <- shutdown{stopMachines} })
}

// faultCheck turns an error into a failed check with its next step.
func faultCheck(name string, err error) server.Check {
	f := fault.As(err)
	return server.Check{Name: name, Verdict: server.Fail, Detail: f.Msg, Next: f.Next}
}
