// Command agentiso-guest is the agent inside a machine: its first process, or,
// beside an image's own init, a process that init does not know of.
package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/guest/boot"
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
	default:
		sys, err = boot.Up(ctx, started, log)
		if err == nil && sys.Mode() == boot.Image {
			err = sys.HandOver()
		}
	}
	if err != nil {
		boot.Die(log, err)
	}
	sys.FreeInitramfs()
	log.Info("ready", "up", boot.Uptime().String(), "started", sys.Started.String())
	if b, e := os.ReadFile("/agentiso-poweroff"); e == nil {
		d, _ := time.ParseDuration(string(b))
		time.Sleep(d)
		log.Info("poweroff", "up", boot.Uptime().String())
		log.Error("poweroff", "err", boot.PowerOff(ctx, time.Second))
	}
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGTERM)
	select {}
}
