// Package servertest runs package server in the test's process over honest
// fakes: a workspace service in memory whose workspaces have agents reached
// over sockets that can be cut, and stores of images and kernels.
//
// It is for tests of the server, the client and the command line. What runs
// inside a workspace is any http.Handler; [Agent] is a small one.
package servertest

import (
	"context"
	"log/slog"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/agentiso/agentiso/internal/server"
)

// Daemon is a server that answers on Socket until the test ends.
type Daemon struct {
	Socket     string
	Server     *server.Server
	Workspaces *Workspaces
	Images     *Images
	Kernels    *Kernels
	System     *System

	served chan error
}

// Start serves on a socket in a new directory. agent makes the inside of every
// workspace; nil is [Agent].
func Start(t testing.TB, agent func() http.Handler) *Daemon {
	t.Helper()
	if agent == nil {
		agent = func() http.Handler { return NewAgent() }
	}
	d := &Daemon{
		Socket:     filepath.Join(t.TempDir(), "s"),
		Workspaces: newWorkspaces(agent),
		Images:     newImages(),
		Kernels:    &Kernels{},
		System:     &System{ShutdownAsked: make(chan bool, 1)},
		served:     make(chan error, 1),
	}
	reg := prometheus.NewRegistry()
	d.Server = server.New(server.Options{
		Workspaces: d.Workspaces, Images: d.Images, Kernels: d.Kernels, System: d.System,
		Metrics: promhttp.HandlerFor(reg, promhttp.HandlerOpts{}), Registerer: reg,
		Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	l, err := server.Listen(d.Socket, "")
	if err != nil {
		t.Fatal(err)
	}
	go func() { d.served <- d.Server.Serve(l) }()
	t.Cleanup(func() { d.Stop(t) })
	return d
}

// Stop shuts the server down and ends every workspace; it may be called early
// and again.
func (d *Daemon) Stop(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := d.Server.Shutdown(ctx); err != nil {
		t.Errorf("shut down: %v", err)
	}
	select {
	case err := <-d.served:
		if err != nil {
			t.Errorf("serve: %v", err)
		}
		d.served <- nil
	case <-ctx.Done():
		t.Error("Serve did not return")
	}
	d.Workspaces.close()
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}
