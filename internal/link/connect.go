package link

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/link/wire"
)

const (
	// firstRetry to lastRetry is the wait between attempts to connect while
	// somebody waits; it doubles. A guest that broke the protocol is given up
	// to hostileRetry, because each of its handshakes can cost staleLimit.
	firstRetry   = time.Millisecond
	lastRetry    = 100 * time.Millisecond
	hostileRetry = time.Second

	// goneAfter is how long a machine's socket must refuse to count as gone:
	// a caller may be earlier than QEMU.
	goneAfter = time.Second
	// linger is how long an attempt goes on when its last caller has left, so
	// that callers with little time do not each begin anew.
	linger = 2 * time.Second
)

// link is one workspace's: at most one session, and at most one goroutine
// that tries to get one while somebody waits for it.
type link struct {
	id   string
	ep   domain.Endpoint
	opts Options

	mu        sync.Mutex
	sess      *session // the last one; may have ended
	attempt   *attempt // nil while nobody tries
	waiters   int
	answered  bool          // an agent has answered since newLink
	serial    bool          // over its serial port, though vsock was asked for
	hostile   bool          // the last session broke the protocol
	held      error         // why new calls wait: suspended, measured
	released  chan struct{} // closed when held is nil again
	closed    chan struct{}
	closeOnce sync.Once
	tasks     sync.WaitGroup

	// What held may be; compared by identity.
	suspended, measured *fault.Error
}

// attempt is one run of connect. err and sess are set before done is closed.
type attempt struct {
	done   chan struct{}
	cancel context.CancelFunc
	sess   *session
	err    error

	mu   sync.Mutex
	last error // what the latest try met
}

func (a *attempt) note(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = err
}

func (a *attempt) obstacle() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

func newLink(id string, ep domain.Endpoint, opts Options) *link {
	return &link{
		id: id, ep: ep, opts: opts, closed: make(chan struct{}),
		suspended: errSuspended(id), measured: errMeasured(id),
	}
}

// open opens a stream to the agent, over a new session if need be.
func (l *link) open(ctx context.Context) (*stream, error) {
	for again := false; ; again = true {
		s, err := l.session(ctx)
		if err != nil {
			return nil, err
		}
		st, err := s.open(ctx)
		switch {
		case err == nil:
			return st, nil
		case errors.Is(err, errEnded) && again:
			return nil, s.reason() // a fresh one ended, too: no bad luck
		case errors.Is(err, errEnded):
			continue // nothing was sent
		case ctx.Err() != nil:
			return nil, waited(ctx, l.id, errSilent)
		default:
			if _, ok := errors.AsType[*fault.Error](err); !ok {
				err = errCut(l.id, err)
			}
			return nil, err
		}
	}
}

// session returns the session of the moment, or waits for the next.
func (l *link) session(ctx context.Context) (*session, error) {
	for {
		l.mu.Lock()
		if l.isClosed() {
			l.mu.Unlock()
			return nil, errClosed(l.id)
		}
		if l.held != nil {
			ch, held := l.released, l.held
			l.mu.Unlock()
			select {
			case <-ch:
			case <-l.closed:
			case <-ctx.Done():
				return nil, waited(ctx, l.id, held)
			}
			continue
		}
		if l.sess != nil && !l.sess.ended() {
			s := l.sess
			l.mu.Unlock()
			return s, nil
		}
		a := l.attempt
		if a == nil {
			a = l.start()
		}
		l.waiters++
		l.mu.Unlock()

		var err error
		select {
		case <-a.done:
			err = a.err
		case <-ctx.Done():
			err = waited(ctx, l.id, a.obstacle())
		}
		l.leave(a)
		if errors.Is(err, errAbandoned) {
			continue
		}
		if err != nil {
			return nil, err
		}
	}
}

func (l *link) isClosed() bool {
	select {
	case <-l.closed:
		return true
	default:
		return false
	}
}

// leave is a waiter's end. The last one's leaving ends the attempt after a
// while.
func (l *link) leave(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiters--; l.waiters > 0 || l.attempt != a {
		return
	}
	l.tasks.Go(func() { // the attempt runs: no Wait has returned
		t := time.NewTimer(linger)
		defer t.Stop()
		select {
		case <-t.C:
		case <-a.done:
			return
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.waiters == 0 && l.attempt == a {
			a.cancel()
		}
	})
}

// errAbandoned is an attempt's that ended because nobody waited any more, or
// because the link was put on hold.
var errAbandoned = errors.New("nobody waits for the agent")

// start begins an attempt; l.mu is held.
func (l *link) start() *attempt {
	limit, late := l.opts.Boot, func(last error) error { return errNoAnswer(l.id, l.opts.Boot, last) }
	if l.answered {
		limit, late = l.opts.Stall, func(error) error { return errStalled(l.id, l.opts.Stall) }
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	a := &attempt{done: make(chan struct{}), cancel: cancel}
	l.attempt = a
	prev, hostile := l.sess, l.hostile
	l.tasks.Go(func() {
		defer cancel()
		if prev != nil {
			prev.wait()
		}
		s, err := l.connect(ctx, a, hostile)
		switch {
		case err == nil:
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			err = late(err)
		case ctx.Err() != nil:
			err = errAbandoned
		}
		l.mu.Lock()
		l.attempt = nil
		if err == nil {
			if l.held != nil || l.isClosed() {
				err = errAbandoned
			} else {
				l.sess, l.answered = s, true
			}
		}
		l.mu.Unlock()
		if s != nil && err != nil {
			s.end(errClosed(l.id))
		}
		a.sess, a.err = s, err
		close(a.done)
	})
	return a
}

// connect tries until it has a session, the machine is gone, or ctx is done.
func (l *link) connect(ctx context.Context, a *attempt, hostile bool) (*session, error) {
	wait, most := firstRetry, lastRetry
	if hostile {
		wait, most = lastRetry, hostileRetry
	}
	var refused time.Time // since when the machine has refused
	l.mu.Lock()
	serial := l.serial
	l.mu.Unlock()
	for ; ; serial = !serial {
		car, err := l.dial(ctx, serial)
		if err == nil {
			l.mu.Lock()
			l.serial = serial
			l.mu.Unlock()
			return l.begin(car), nil
		}
		a.note(err)
		if _, ok := errors.AsType[*wire.ViolationError](err); ok {
			most = hostileRetry
		}
		switch {
		case ctx.Err() != nil:
			return nil, err
		case !refuses(err):
			refused = time.Time{}
		case refused.IsZero():
			refused = time.Now()
		case time.Since(refused) >= goneAfter:
			l.mu.Lock()
			l.answered = false // whatever comes next boots first
			l.mu.Unlock()
			return nil, errGone(l.id, err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, err
		}
		wait = min(2*wait, most)
	}
}

// refuses reports whether err is how the endpoint of an ended machine answers.
func refuses(err error) bool {
	for _, e := range []syscall.Errno{
		syscall.ENOENT, syscall.ECONNREFUSED, // no such socket, no QEMU behind it
		syscall.ENODEV, // no guest has that CID
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// begin makes a session on car, and has its end logged.
func (l *link) begin(car carrier) *session {
	s := newSession(l.id, l.opts, car)
	began := time.Now()
	l.opts.Log.Debug("link session began", "workspace", l.id)
	s.tasks.Go(func() {
		err := s.reason()
		_, hostile := errors.AsType[*wire.ViolationError](err)
		l.mu.Lock()
		l.hostile = hostile
		l.mu.Unlock()
		if hostile {
			l.opts.Log.Warn("link session ended", "workspace", l.id, "err", err, "dur", time.Since(began))
		} else {
			l.opts.Log.Debug("link session ended", "workspace", l.id, "err", err, "dur", time.Since(began))
		}
	})
	return s
}

// close ends the link for good. It returns when nothing of it runs.
func (l *link) close() {
	l.closeOnce.Do(func() {
		l.mu.Lock()
		close(l.closed)
		l.mu.Unlock()
	})
	l.halt(errClosed(l.id))
	l.tasks.Wait()
}

// halt ends the session with cause, and the attempt to get one.
func (l *link) halt(cause error) {
	l.mu.Lock()
	s, a := l.sess, l.attempt
	if a != nil {
		a.cancel()
	}
	l.mu.Unlock()
	if a != nil {
		<-a.done
	}
	if s != nil {
		s.end(cause)
	}
}

// hold makes new calls wait, lets pending ones finish until ctx is done, and
// ends the session with cause. If calls are held already it returns why.
func (l *link) hold(ctx context.Context, cause error) (already error) {
	l.mu.Lock()
	if l.held != nil {
		defer l.mu.Unlock()
		return l.held
	}
	l.held, l.released = cause, make(chan struct{})
	s := l.sess
	l.mu.Unlock()
	if s != nil {
		s.drain(ctx)
	}
	l.halt(cause)
	return nil
}

// unhold lets the calls go on that hold has made wait for cause.
func (l *link) unhold(cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == cause { //nolint:errorlint // whose hold it is, not what kind
		l.held = nil
		close(l.released)
	}
}

// otherTry is how long one attempt over the serial port of a vsock machine
// lasts. An agent that listens there answers at once.
const otherTry = 500 * time.Millisecond

// dial connects once. An agent that found no vsock listens on its serial port
// instead, so that the two are tried in turn if the machine has both.
func (l *link) dial(ctx context.Context, serial bool) (carrier, error) {
	if l.ep.Kind == domain.LinkVsock {
		if !serial || l.ep.Socket == "" {
			return dialPerStream(ctx, l.ep, l.opts.vsock)
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, otherTry)
		defer cancel()
	}
	c, err := dialSerial(ctx, l.ep.Socket, wire.Mux, 0)
	if err != nil {
		return nil, err
	}
	m, err := newMux(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	return m, nil
}

func checkEndpoint(ep domain.Endpoint) error {
	switch ep.Kind {
	case domain.LinkSerial:
		if ep.Socket == "" {
			return errors.New("serial endpoint without a socket")
		}
	case domain.LinkVsock:
		if ep.CID == 0 || len(ep.Key) != len(wire.Nonce{}) {
			return fmt.Errorf("vsock endpoint with CID %d and a key of %d bytes, want %d", ep.CID, len(ep.Key), len(wire.Nonce{}))
		}
	default:
		return fmt.Errorf("unknown link kind %q", ep.Kind)
	}
	return nil
}

func sameEndpoint(a, b domain.Endpoint) bool {
	return a.Kind == b.Kind && a.Socket == b.Socket && a.CID == b.CID && string(a.Key) == string(b.Key)
}
