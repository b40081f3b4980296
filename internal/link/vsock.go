package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/link/wire"
)

// dialCID connects to the agent's port of a guest.
type dialCID func(ctx context.Context, cid uint32) (net.Conn, error)

func vsockDial(ctx context.Context, cid uint32) (net.Conn, error) {
	return vsock.DialContext(ctx, cid, wire.VsockPort, nil)
}

// firstWord bounds how long one attempt waits for an agent that accepts
// connections but says nothing.
const firstWord = 2 * time.Second

// perStream is the carrier of a vsock link: a connection per stream.
type perStream struct {
	ep    domain.Endpoint
	conns dialCID

	epoch    time.Time
	lastRead atomic.Int64 // nanoseconds after epoch
	down     chan struct{}
	downOnce sync.Once
	err      error // set before down is closed

	mu   sync.Mutex
	open map[*vsockStream]struct{}
}

// dialPerStream returns once the agent has answered on a connection.
func dialPerStream(ctx context.Context, ep domain.Endpoint, dial dialCID) (carrier, error) {
	v := &perStream{
		ep: ep, conns: dial, epoch: time.Now(),
		down: make(chan struct{}), open: map[*vsockStream]struct{}{},
	}
	ctx, cancel := context.WithTimeout(ctx, firstWord)
	defer cancel()
	if err := v.probe(ctx); err != nil {
		return nil, err
	}
	return v, nil
}

// connect makes a connection and shows the key.
func (v *perStream) connect(ctx context.Context, mode wire.Mode, size int64) (net.Conn, error) {
	c, err := v.conns(ctx, v.ep.CID)
	if err != nil {
		return nil, err
	}
	f := wire.Frame{Kind: wire.Key, Mode: mode, Version: wire.Version, Nonce: wire.Nonce(v.ep.Key), Size: size}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	_, err = c.Write(f.Append(nil))
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("show key to agent: %w", err)
	}
	return c, nil
}

func (v *perStream) dial(ctx context.Context) (rawStream, error) {
	c, err := v.connect(ctx, wire.Mux, 0)
	if err != nil {
		v.mu.Lock()
		alone := len(v.open) == 0
		v.mu.Unlock()
		// With nobody there the next caller waits for somebody. While other
		// streams live, it may be a full backlog: they must not suffer.
		if ctx.Err() == nil && (alone || errors.Is(err, syscall.ENODEV)) {
			v.fail(err)
		}
		return nil, err
	}
	st := &vsockStream{Conn: c, v: v}
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-v.down:
		c.Close()
		return nil, net.ErrClosed
	default:
	}
	v.open[st] = struct{}{}
	return st, nil
}

// probe has one byte echoed.
func (v *perStream) probe(ctx context.Context) error {
	c, err := v.connect(ctx, wire.Echo, 1)
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	var b [1]byte
	_, err = c.Write(b[:])
	if err == nil {
		_, err = io.ReadFull(c, b[:])
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ctx.Err(), errSilent)
	default:
		return fmt.Errorf("the agent closed the connection: %w", err)
	}
	v.heard()
	return nil
}

func (v *perStream) heard() { v.lastRead.Store(int64(time.Since(v.epoch))) }

func (v *perStream) idle() time.Duration {
	return time.Since(v.epoch) - time.Duration(v.lastRead.Load())
}

func (v *perStream) broken() <-chan struct{} { return v.down }
func (v *perStream) cause() error            { return v.err }

func (v *perStream) fail(err error) {
	v.downOnce.Do(func() {
		v.err = err
		close(v.down)
	})
}

func (v *perStream) close() {
	v.fail(net.ErrClosed)
	v.mu.Lock()
	defer v.mu.Unlock()
	for st := range v.open {
		st.Conn.Close()
	}
	clear(v.open)
}

func (v *perStream) wait() {} // it has no goroutines

// vsockStream is one connection.
type vsockStream struct {
	net.Conn
	v   *perStream
	eof atomic.Bool
}

func (st *vsockStream) Read(p []byte) (int, error) {
	n, err := st.Conn.Read(p)
	if n > 0 {
		st.v.heard()
	}
	if errors.Is(err, io.EOF) {
		// The kernel tells an agent's end from a machine's: that is a reset.
		st.eof.Store(true)
	}
	return n, err
}

func (st *vsockStream) complete() bool { return st.eof.Load() }

func (st *vsockStream) closeWrite() error {
	if cw, ok := st.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}

func (st *vsockStream) discard() {
	st.v.mu.Lock()
	delete(st.v.open, st)
	st.v.mu.Unlock()
	st.Conn.Close()
}
