package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/link/wire"
	"github.com/agentiso/agentiso/internal/measure"
)

// copyBytes is what `bench link` moves at a time.
const copyBytes = 256 << 20

// echoes is how many one-byte round trips one raw sample is the mean of.
const echoes = 100

// benchLink measures the way to a guest at three heights: the raw port, one
// HTTP call to the agent, and what a user does (exec and cp, over the daemon's
// socket). Bulk ratios are to the raw port.
func benchLink(ctx context.Context, e *benchEnv, n, copies int, tick func(string)) ([]measure.Result, error) {
	w, _, err := e.client.Create(ctx, client.CreateOptions{Name: "bench", Image: "dev", MemoryMiB: 1024})
	if err != nil {
		return nil, err
	}
	s := measure.New("link")
	if err := e.roundTrips(ctx, s, w.ID, n, tick); err != nil {
		return nil, err
	}
	if err := e.bulk(ctx, s, w.ID, copies, tick); err != nil {
		return nil, err
	}
	return s.Results("raw"), nil
}

func (e *benchEnv) roundTrips(ctx context.Context, s *measure.Samples, id string, n int, tick func(string)) error {
	h := &http.Client{Transport: e.d.links.Transport(id)}
	for i := range n {
		tick(fmt.Sprintf("round trips %d/%d", i+1, n))
		took, err := e.d.links.Raw(ctx, id, wire.Echo, echoes)
		if err != nil {
			return fmt.Errorf("raw round trip: %w", err)
		}
		s.AddDuration("raw", "rtt_ms", took/echoes)

		began := time.Now()
		if err := health(ctx, h); err != nil {
			return err
		}
		s.AddDuration("agent", "rtt_ms", time.Since(began))

		began = time.Now()
		code, err := e.client.Exec(ctx, id, []string{"true"}, client.ExecOptions{})
		if err != nil || code != 0 {
			return fmt.Errorf("exec true: code %d: %w", code, err)
		}
		s.AddDuration("exec-true", "rtt_ms", time.Since(began))
	}
	return nil
}

// health asks the agent for the least that it answers.
func health(ctx context.Context, h *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://guest/health", nil)
	if err != nil {
		return err
	}
	res, err := h.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusNoContent {
		return fmt.Errorf("health: %s", res.Status)
	}
	return nil
}

// bulk moves 256 MiB each way, raw and as cp does. The file's bytes are random,
// so that nothing on the way can make them fewer.
func (e *benchEnv) bulk(ctx context.Context, s *measure.Samples, id string, n int, tick func(string)) (err error) {
	dir, err := os.MkdirTemp("", "agb-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	file := filepath.Join(dir, "file")
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.Reader, copyBytes)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	rate := func(name, metric string, took time.Duration) {
		s.Add(name, metric, "MB/s", copyBytes/1e6/took.Seconds())
	}
	for i := range n {
		tick(fmt.Sprintf("256 MiB each way %d/%d", i+1, n))
		for _, way := range []struct {
			metric string
			mode   wire.Mode
			copy   func() error
		}{
			{"to_guest", wire.Sink, func() error {
				_, err := e.client.CopyTo(ctx, id, file, "/tmp/file", client.CopyOptions{User: "root"})
				return err
			}},
			{"from_guest", wire.Source, func() error {
				_, err := e.client.CopyFrom(ctx, id, "/tmp/file", filepath.Join(dir, "back"), client.CopyOptions{User: "root"})
				return err
			}},
		} {
			// What the guest still writes back of the copy before is not this one's.
			if code, err := e.client.Exec(ctx, id, []string{"sync"}, client.ExecOptions{User: "root"}); err != nil || code != 0 {
				return fmt.Errorf("sync: code %d: %w", code, err)
			}
			took, err := e.d.links.Raw(ctx, id, way.mode, copyBytes)
			if err != nil {
				return fmt.Errorf("raw %s: %w", way.metric, err)
			}
			rate("raw", way.metric, took)
			began := time.Now()
			if err := way.copy(); err != nil {
				return fmt.Errorf("cp %s: %w", way.metric, err)
			}
			rate("cp", way.metric, time.Since(began))
		}
	}
	return nil
}
