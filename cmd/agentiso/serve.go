package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/server"
)

const (
	// drainLimit bounds what calls under way may still finish or undo after
	// the daemon was told to end; killing a machine and deleting a disk take
	// milliseconds, seconds on a host in trouble.
	drainLimit = 30 * time.Second
	// stopMachinesLimit bounds a clean shutdown of every guest.
	stopMachinesLimit = 2 * time.Minute
)

// serve runs the daemon until a signal or a Shutdown call. It calls ready once
// the socket answers. The stop order is: listeners, requests, workspaces
// (machines left running unless asked), then what they stood on.
func serve(ctx context.Context, cfg *config.Config, log *slog.Logger, ready func()) (err error) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	d, err := assemble(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	sys := newSystem(d)
	srv := server.New(server.Options{
		Workspaces: d.workspaces, Images: d.images, Kernels: d.kernels, System: sys,
		Metrics: d.telemetry.Handler(), Registerer: d.telemetry.Registry(), Trace: d.telemetry.Middleware, Log: log,
	})
	l, err := server.Listen(cfg.Server.Socket, cfg.Server.SocketGroup)
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.Go(func() error { return srv.Serve(l) })
	metrics, err := d.serveMetrics(ctx, &g)
	if err != nil {
		return errors.Join(err, srv.Shutdown(ctx), g.Wait())
	}
	log.Info("serving", "op", "serve", "socket", cfg.Server.Socket, "version", version)
	ready()

	var how shutdown
	select {
	case <-ctx.Done():
	case how = <-sys.asked:
	}
	stop() // a second signal ends the process at once
	log.Info("stopping", "op", "serve", "stop_machines", how.stopMachines)
	return errors.Join(d.wind(srv, metrics, how), g.Wait())
}

// wind ends requests and operations, in this order.
func (d *daemon) wind(srv *server.Server, metrics *http.Server, how shutdown) error {
	ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
	defer cancel()
	// Operations first learn that they are to end, then the server waits for
	// their callers to be told.
	closed := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopMachinesLimit+drainLimit)
		defer cancel()
		closed <- d.workspaces.Close(ctx, how.stopMachines)
	}()
	errs := []error{srv.Shutdown(ctx)}
	if metrics != nil {
		errs = append(errs, metrics.Shutdown(ctx))
	}
	return errors.Join(append(errs, <-closed)...)
}

// serveMetrics offers /metrics over TCP when the configuration asks for it.
func (d *daemon) serveMetrics(ctx context.Context, g *errgroup.Group) (*http.Server, error) {
	addr := d.cfg.Server.MetricsListen
	if addr == "" {
		return nil, nil
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for metrics on %s: %w", addr, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", d.telemetry.Handler())
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	g.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve metrics: %w", err)
		}
		return nil
	})
	return s, nil
}
