// Package port is the guest's end of the agent link: it turns the channel to
// the host, a virtio-serial port or vsock, into a net.Listener whose
// connections carry one HTTP request each.
//
// What the bytes mean is package wire's business, and what the requests mean
// their handler's. The host is trusted, but not to be there: it may vanish in
// the middle of a frame and come back as another process, or as another host
// if this guest is a copy of one that ran before.
//
// Invariants: a listener never ends because the host is gone; whatever ends a
// session ends every connection of it, so that no handler waits for a host
// that has left; and every goroutine has ended when Close returns.
package port

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// Options are what both kinds of listener take.
type Options struct {
	// Log gets one line per session; nil is none.
	Log *slog.Logger
}

func (o Options) log() *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
}

// queue hands connections from a listener's goroutines to Accept.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	err   error // set before done is closed
}

func newQueue() *queue {
	return &queue{conns: make(chan net.Conn), done: make(chan struct{})}
}

// end makes Accept return err from now on.
func (q *queue) end(err error) {
	q.once.Do(func() {
		q.err = err
		close(q.done)
	})
}

// put hands over c, or closes it once the listener or its session has ended.
func (q *queue) put(c net.Conn, gone <-chan struct{}) {
	select {
	case q.conns <- c:
		return
	case <-q.done:
	case <-gone:
	}
	_ = c.Close() // nobody has seen it
}

// Accept returns the next connection, and net.ErrClosed after Close.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case <-q.done:
		return nil, q.err
	default:
	}
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, q.err
	}
}

// ended reports whether end was called.
func (q *queue) ended() bool {
	select {
	case <-q.done:
		return true
	default:
		return false
	}
}

type addr string

func (a addr) Network() string { return "agentlink" }
func (a addr) String() string  { return string(a) }

// past is a deadline that makes pending and coming reads and writes fail.
var past = time.Unix(1, 0)

func interrupted(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
