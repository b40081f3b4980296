package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/config"
	"github.com/agentiso/agentiso/internal/server"
)

// benchEnv is a daemon of a benchmark's own, in this process, over private
// records, disks and sockets. Images and kernels are those of the user's data
// directory: hard links to files that nobody changes. close leaves nothing.
type benchEnv struct {
	d      *daemon
	client *client.Client
	srv    *server.Server
	served chan error
	dirs   []string
}

// benchDir names the private data directories below the user's.
const benchDir = "bench-"

func startBench(ctx context.Context, cfg *config.Config, log *slog.Logger) (_ *benchEnv, err error) {
	sweepBench(cfg.Server.DataDir)
	e := &benchEnv{served: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
		}
	}()
	data, err := os.MkdirTemp(cfg.Server.DataDir, benchDir)
	if err != nil {
		return nil, fmt.Errorf("make directory for the benchmark: %w", err)
	}
	e.dirs = append(e.dirs, data)
	run, err := os.MkdirTemp("", "agb-")
	if err != nil {
		return nil, fmt.Errorf("make directory for the benchmark: %w", err)
	}
	e.dirs = append(e.dirs, run)
	for _, store := range []string{"images", "kernels"} {
		if err := linkTree(filepath.Join(cfg.Server.DataDir, store), filepath.Join(data, store)); err != nil {
			return nil, fmt.Errorf("link %s for the benchmark: %w", store, err)
		}
	}
	own := *cfg
	own.Server.DataDir, own.Server.RunDir = data, run
	own.Server.Socket = filepath.Join(run, "s")
	if e.d, err = assemble(ctx, &own, log); err != nil {
		return nil, err
	}
	e.srv = server.New(server.Options{
		Workspaces: e.d.workspaces, Images: e.d.images, Kernels: e.d.kernels, System: newSystem(e.d),
		Registerer: e.d.telemetry.Registry(), Log: log,
	})
	l, err := server.Listen(own.Server.Socket, "")
	if err != nil {
		return nil, err
	}
	go func() { e.served <- e.srv.Serve(l) }()
	e.client, err = client.New(client.Options{Socket: own.Server.Socket})
	return e, err
}

func (e *benchEnv) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopMachinesLimit)
	defer cancel()
	var errs []error
	if e.d != nil && e.d.workspaces != nil {
		all, _ := e.d.workspaces.List(ctx)
		for _, w := range all {
			_, err := e.d.workspaces.Destroy(ctx, w.ID)
			errs = append(errs, err)
		}
	}
	if e.client != nil {
		e.client.Close()
		errs = append(errs, e.srv.Shutdown(ctx), <-e.served)
	}
	if e.d != nil {
		if e.d.workspaces != nil {
			errs = append(errs, e.d.workspaces.Close(ctx, true))
		}
		errs = append(errs, e.d.close())
	}
	for _, dir := range e.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// sweepBench removes what killed benchmarks have left: directories whose lock
// nobody holds.
func sweepBench(data string) {
	dirs, _ := filepath.Glob(filepath.Join(data, benchDir+"*"))
	for _, dir := range dirs {
		f, err := os.OpenFile(filepath.Join(dir, "daemon.lock"), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(dir)
		}
		f.Close()
	}
}

// linkTree copies the tree src to dst with hard links, without work in
// progress and locks. Small files that are replaced by renames are linked too:
// a rename on one side does not show on the other.
func linkTree(src, dst string) error {
	return filepath.WalkDir(src, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := e.Name()
		if e.IsDir() && (strings.HasPrefix(name, "tmp") || name == "apt") {
			return fs.SkipDir
		}
		to := filepath.Join(dst, strings.TrimPrefix(path, src))
		if e.IsDir() {
			return os.MkdirAll(to, 0o755)
		}
		if !e.Type().IsRegular() || name == "lock" {
			return nil
		}
		return os.Link(path, to)
	})
}

// benchNeeds makes what is missing of kernels and images in the user's own
// daemon, so that it is kept for the next run.
func benchNeeds(ctx context.Context, c *client.Client, lean bool, images []string, report func(client.Progress)) error {
	if _, err := c.FetchKernel(ctx, false, report); err != nil {
		return err
	}
	if lean {
		if _, err := c.BuildKernel(ctx, 0, false, report); err != nil {
			return err
		}
	}
	for _, recipe := range images {
		if _, err := c.BuildImage(ctx, client.BuildImageOptions{Recipe: recipe}, report); err != nil {
			return err
		}
	}
	return nil
}
