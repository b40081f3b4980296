// Command agentiso-guest is the agent inside a machine. It is the machine's
// first process and stays that in mode fast; in mode image it is a process
// beside the image's own init, which does not know of it. Once the root is up it
// opens the link to the host and serves it until the machine ends.
//
// It takes no arguments: what it is to do it learns from its own name, its
// process number and the kernel's command line (package guest/boot).
package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/guest"
	"github.com/agentiso/agentiso/internal/guest/boot"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/port"
	"github.com/agentiso/agentiso/internal/guest/proc"
	"github.com/agentiso/agentiso/internal/guest/reap"
)

// version is set at build time.
var version = "devel"

const (
	// portName is the virtio-serial port's, as package qemu names it.
	portName = "agent"
	// signalGrace is what processes get when a signal ends the machine.
	signalGrace = 2 * time.Second
)

func main() {
	started := boot.Uptime()
	log := boot.NewLogger(boot.NewConsole(), slog.LevelInfo)
	ctx := context.Background()
	var sys *boot.System
	var err error
	switch {
	case os.Args[0] == boot.ShutdownPath:
		boot.FinishShutdown(log)
		return
	case os.Args[0] == boot.AsideName:
		sys, err = boot.Aside(log)
	case os.Getpid() != 1:
		err = errors.New("the agent is the first process of a machine: it does not run by hand")
	default:
		if sys, err = boot.Up(ctx, started, log); err == nil && sys.Mode() == boot.Image {
			err = sys.HandOver()
		}
	}
	if err == nil {
		sys.FreeInitramfs()
		err = run(ctx, sys, log)
	}
	boot.Die(log, err)
}

// run serves the host until the machine ends; it returns only on a failure that
// leaves the agent without a link.
func run(ctx context.Context, sys *boot.System, log *slog.Logger) error {
	ctx, stop := context.WithCancel(ctx)
	var owned sync.WaitGroup
	defer owned.Wait()
	defer stop()

	reaper := reap.New()
	owned.Go(func() { reaper.Run(ctx) })
	owned.Go(func() { obeySignals(ctx, log) })

	link, err := listen(ctx, sys.Cmdline.Link, log)
	if err != nil {
		return err
	}
	store := identity.NewStore(identity.Snapshot{})
	id := identity.NewService(identity.Options{
		Log: log, Store: store, Version: version, InitMode: string(sys.Mode()), PowerOff: boot.PowerOff,
	})
	processes := proc.New(reaper, store, log)
	tunnels := identity.NewTunnels(log)
	server := guest.New(guest.Options{Identity: store, Process: processes, Guest: id, Connect: tunnels, Log: log})

	ready := boot.Uptime()
	id.SetReady(ready, ready-sys.Started)
	log.Info("ready", "mode", string(sys.Mode()), "link", link.Addr().String(),
		"boot", ready.Round(time.Millisecond).String(), "init", (ready - sys.Started).Round(time.Millisecond).String())

	err = server.Serve(link)
	cut, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return errors.Join(err, server.Close(cut), tunnels.Close(), processes.Close(), id.Close(), link.Close())
}

// listen opens the link that the host asked for. Where vsock does not come up
// the serial port is there in its stead: the host finds out by the silence.
func listen(ctx context.Context, kind boot.Link, log *slog.Logger) (net.Listener, error) {
	if kind == boot.Vsock {
		l, err := port.ListenVsock(ctx, port.VsockOptions{Options: port.Options{Log: log}})
		if err == nil {
			return l, nil
		}
		log.Warn("fall back to the serial port", "err", err)
	}
	return port.ListenSerial(ctx, portName, port.Options{Log: log})
}

// obeySignals powers off when process 1 is told to: busybox and sysvinit's
// poweroff, reboot and halt send signals, and so does the kernel for
// ctrl-alt-del. Beside an image's init they have no such meaning.
func obeySignals(ctx context.Context, log *slog.Logger) {
	if os.Getpid() != 1 {
		return
	}
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGINT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPWR)
	defer signal.Stop(ch)
	select {
	case <-ctx.Done():
	case sig := <-ch:
		log.Info("power off", "signal", sig.String())
		if err := boot.PowerOff(ctx, signalGrace); err != nil {
			log.Error("power off", "err", err)
		}
	}
}
