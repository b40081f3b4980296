// Package link is the host's end of the channels to the agents in the
// machines: it keeps one link per workspace and carries HTTP over it.
//
// It starts no machine and knows nothing of what the requests mean. What goes
// over the channel below HTTP is in package wire; how the guest answers, in
// internal/guest/port.
//
// The guest is hostile. On the serial link a wire.Guard judges every frame
// header before yamux sees it; on both links HTTP headers, concurrent calls
// and the time without a sign of life are limited, and a response body is
// held only up to wire.MaxWindow ahead of its reader. A guest that breaks a
// rule loses its session; its next caller gets a new one.
//
// Invariants: a session exists only between a call that needed it and its
// end, and nothing runs for a link that nobody uses; while calls are pending
// the agent is asked for a sign of life; every call ends within two seconds
// of Close, Suspend or the machine's end, with a fault that says which; no
// goroutine of a link outlives its Close. A call is never sent twice.
//
// Lock order: Hub.mu, then link.mu, then session.mu. No lock is held across
// I/O.
package link

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
)

// Options are a hub's; the zero value is what a daemon uses.
type Options struct {
	// Log gets one line when a session begins or ends; nil is none.
	Log *slog.Logger
	// Boot is how long a caller without a deadline of its own waits for an
	// agent that has never answered; 0 is ten minutes, some twenty times the
	// slowest boot measured (32 s, emulated, stock initrd and systemd).
	Boot time.Duration
	// Stall is how long an agent that has answered before may give no sign of
	// life while a call is pending or waiting; 0 is 30 seconds.
	Stall time.Duration
	// Ping is how long a session with calls pending may be silent before it
	// is asked for a sign of life; 0 is 5 seconds.
	Ping time.Duration

	vsock dialCID // nil but in tests
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Boot == 0 {
		o.Boot = 10 * time.Minute
	}
	if o.Stall == 0 {
		o.Stall = 30 * time.Second
	}
	if o.vsock == nil {
		o.vsock = vsockDial
	}
	if o.Ping == 0 {
		o.Ping = 5 * time.Second
	}
	return o
}

// Hub holds the links of all machines. It implements workspace.Guests. Its
// methods may be called at any time, concurrently, also for one id.
type Hub struct {
	opts Options
	http *http.Transport

	mu     sync.Mutex
	links  map[string]*link
	closed bool
}

// NewHub returns a hub without links.
func NewHub(opts Options) *Hub {
	return &Hub{opts: opts.withDefaults(), http: newTransport(), links: map[string]*link{}}
}

// Open makes the link of id usable and returns at once: the first call over
// it connects and waits for the agent within its own context. Opening a link
// again with the endpoint it has does nothing; with another endpoint the old
// link is closed first; a machine that takes the place of another at the same
// endpoint wants a Close in between. The error is that of an endpoint that
// cannot be used, or of a hub that was shut down.
func (h *Hub) Open(id string, ep domain.Endpoint) error {
	if err := checkEndpoint(ep); err != nil {
		return fmt.Errorf("open link %s: %w", id, err)
	}
	l := newLink(id, ep, h.opts)
	h.mu.Lock()
	old := h.links[id]
	if h.closed {
		h.mu.Unlock()
		return errClosed(id)
	}
	if old != nil && sameEndpoint(old.ep, ep) {
		h.mu.Unlock()
		return nil
	}
	h.links[id] = l
	h.mu.Unlock()
	if old != nil {
		old.close()
	}
	return nil
}

// Close ends the link of id. Its calls have an error when Close returns or
// within moments of it. Closing what is not open does nothing.
func (h *Hub) Close(id string) {
	h.mu.Lock()
	l := h.links[id]
	delete(h.links, id)
	h.mu.Unlock()
	if l != nil {
		l.close()
	}
}

// Shutdown closes every link; the hub opens none any more.
func (h *Hub) Shutdown() {
	h.mu.Lock()
	h.closed = true
	links := h.links
	h.links = nil
	h.mu.Unlock()
	var wg sync.WaitGroup
	for _, l := range links {
		wg.Go(l.close)
	}
	wg.Wait()
}

// Suspend ends the session of id and closes the host's end of the channel, as
// a capture needs it. Calls that are pending have until ctx is done to finish
// and end with a fault otherwise; new calls wait for [Hub.Resume]. Suspending
// what is suspended does nothing. The error is that there is no such link, or
// that it is being measured.
func (h *Hub) Suspend(ctx context.Context, id string) error {
	l, err := h.link(id)
	if err != nil {
		return err
	}
	if held := l.hold(ctx, l.suspended); held != nil && held != error(l.suspended) { //nolint:errorlint // whose hold it is, not what kind
		return held
	}
	return nil
}

// Resume lets the calls go on that wait since [Hub.Suspend]. Resuming what is
// not suspended does nothing.
func (h *Hub) Resume(id string) {
	if l, err := h.link(id); err == nil {
		l.unhold(l.suspended)
	}
}

// Transport returns what carries HTTP to the agent of id. It may be kept: it
// finds the link of the moment at each request, so that it stays good when a
// machine is replaced. Requests are http://HOST/…, whatever the host.
// An HTTP/1.1 upgrade works; the 101 response's body is then an
// io.ReadWriteCloser with CloseWrite.
//
// Errors of the link are faults of kind unavailable, or timeout if the
// request's deadline passed before the agent had answered. Response bodies
// end with the same faults; a body cut short never looks complete.
func (h *Hub) Transport(id string) http.RoundTripper { return &transport{h, id} }

// Dial opens a stream to the agent of id, below HTTP. The caller closes it.
// Errors are as those of [Hub.Transport].
func (h *Hub) Dial(ctx context.Context, id string) (net.Conn, error) {
	l, err := h.link(id)
	if err != nil {
		return nil, err
	}
	return l.open(ctx)
}

func (h *Hub) link(id string) (*link, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.links[id]; l != nil {
		return l, nil
	}
	return nil, errNotOpen(id)
}
