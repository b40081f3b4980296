package server

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"connectrpc.com/connect"
)

// bounded is around every Connect handler: it turns errors and panics into
// what users read, and it gives up waiting for a handler one second after the
// server began to shut down, while the handler undoes what it had begun.
type bounded struct{ s *Server }

var _ connect.Interceptor = (*bounded)(nil)

var errAbandoned = errors.New("the call was answered before it ended")

// run calls fn, and returns early with the reason when the server's time is
// up. fn then goes on, counted by the server.
func (b *bounded) run(ctx context.Context, fn func() error) error {
	c := callOf(ctx)
	done := make(chan error, 1)
	// The surrounding request is counted and has not ended, so this cannot
	// race with Shutdown's Wait.
	b.s.ops.Go(func() {
		defer func() {
			if p := recover(); p != nil {
				b.s.o.Log.Error("panic", "op", c.op, "request", c.id, "err", fmt.Sprint(p), "stack", string(debug.Stack()))
				done <- panicked(c.id)
			}
		}()
		done <- fn()
	})
	var err error
	select {
	case err = <-done:
	case <-b.s.overdue:
		select {
		case err = <-done:
		default:
			err = context.Cause(b.s.life)
		}
	}
	if err == nil {
		return nil
	}
	if c.err = err; gone(ctx, err) {
		c.err = nil
	}
	return connectError(b.s.faultOf(ctx, err))
}

func (b *bounded) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if r, ok := req.Any().(interface{ GetRef() string }); ok {
			callOf(ctx).ref = r.GetRef()
		}
		var res connect.AnyResponse
		var mu sync.Mutex
		err := b.run(ctx, func() error {
			r, err := next(ctx, req)
			mu.Lock()
			defer mu.Unlock()
			res = r
			return err
		})
		if err != nil {
			return nil, err
		}
		mu.Lock()
		defer mu.Unlock()
		return res, nil
	}
}

func (b *bounded) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		g := &guardedConn{StreamingHandlerConn: conn}
		defer g.abandon()
		return b.run(ctx, func() error { return next(ctx, g) })
	}
}

func (b *bounded) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// guardedConn keeps a handler that was answered for from using the stream.
type guardedConn struct {
	connect.StreamingHandlerConn
	mu    sync.Mutex
	ended bool
}

func (g *guardedConn) Send(m any) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return errAbandoned
	}
	return g.StreamingHandlerConn.Send(m)
}

// abandon waits for a Send under way, which ends at the latest when the server
// closes the connection.
func (g *guardedConn) abandon() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended = true
}
