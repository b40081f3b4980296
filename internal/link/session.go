package link

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/link/wire"
)

// carrier is what a session needs of its kind of link.
type carrier interface {
	// dial opens a stream. It returns within ctx.
	dial(ctx context.Context) (rawStream, error)
	// probe asks the agent for a sign of life. It returns within ctx.
	probe(ctx context.Context) error
	// idle is for how long there has been none.
	idle() time.Duration
	// broken is closed when the link ends by itself; cause says why.
	broken() <-chan struct{}
	cause() error
	// close ends the link and unblocks every stream.
	close()
	// wait returns when no goroutine of the carrier runs. It is called after
	// close, once no dial, probe or discard is in progress.
	wait()
}

// rawStream is one stream of a carrier.
type rawStream interface {
	io.ReadWriter
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	LocalAddr() net.Addr
	RemoteAddr() net.Addr
	// complete reports whether an end of reading was the agent's, and not
	// that of the session.
	complete() bool
	closeWrite() error
	// discard ends the stream. It may take as long as a write.
	discard()
}

// session is one connection to an agent, from the answered hello to its end.
// Its streams end with it, and their errors say why it did.
type session struct {
	id    string
	opts  Options
	car   carrier
	done  chan struct{} // closed once the carrier is closed
	tasks sync.WaitGroup
	slots chan struct{} // one per open stream

	mu      sync.Mutex
	err     error // why it ended
	ending  chan struct{}
	streams int
	busy    chan struct{} // has a token when streams went from 0 to 1
	quiet   chan struct{} // closed when streams is 0; replaced
}

func newSession(id string, opts Options, car carrier) *session {
	s := &session{
		id: id, opts: opts, car: car,
		done: make(chan struct{}), ending: make(chan struct{}),
		slots: make(chan struct{}, wire.MaxStreams),
		busy:  make(chan struct{}, 1), quiet: make(chan struct{}),
	}
	close(s.quiet)
	s.tasks.Go(s.watch)
	return s
}

// end ends the session with cause, unless it has ended, and waits until all
// of its goroutines have.
func (s *session) end(cause error) {
	s.stop(cause)
	s.wait()
}

// wait waits for the goroutines of a session that is ending.
func (s *session) wait() {
	s.tasks.Wait()
	s.car.wait()
}

func (s *session) stop(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = cause
		close(s.ending)
	}
}

// watch waits for the end and brings it about. While streams are open it asks
// the agent for signs of life.
func (s *session) watch() {
	defer close(s.done)
	defer s.car.close()
	var probes sync.WaitGroup
	defer probes.Wait()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	tick := time.NewTicker(s.opts.Ping)
	tick.Stop()
	var since time.Time // when the agent first had something to answer
	var probing atomic.Bool
	for {
		select {
		case <-s.ending:
			return
		case <-s.car.broken():
			s.stop(s.explain(s.car.cause()))
			return
		case <-s.busy:
			if since.IsZero() || s.car.idle() < time.Since(since) {
				since = time.Now()
			}
			tick.Reset(s.opts.Ping)
		case <-tick.C:
			s.mu.Lock()
			open := s.streams
			s.mu.Unlock()
			if open == 0 {
				tick.Stop()
				continue
			}
			// Silence before the call says nothing.
			silent := min(s.car.idle(), time.Since(since))
			if silent >= s.opts.Stall {
				s.stop(errStalled(s.id, s.opts.Stall))
				return
			}
			if silent >= s.opts.Ping && !probing.Swap(true) {
				probes.Go(func() {
					defer probing.Store(false)
					ctx, cancel := context.WithTimeout(ctx, s.opts.Stall)
					defer cancel()
					_ = s.car.probe(ctx) // what counts is that something came
				})
			}
		}
	}
}

// explain makes the fault of what ended the channel.
func (s *session) explain(cause error) error {
	if v, ok := errors.AsType[*wire.ViolationError](cause); ok {
		return errViolation(s.id, v)
	}
	switch {
	case errors.Is(cause, wire.ErrAnew):
		return errAnew(s.id)
	case cause == nil || errors.Is(cause, io.EOF) || errors.Is(cause, syscall.EPIPE) || errors.Is(cause, syscall.ECONNRESET):
		cause = errors.New("its end was closed")
	}
	return errCut(s.id, cause)
}

// ended reports whether the session is of no more use.
func (s *session) ended() bool {
	select {
	case <-s.ending:
		return true
	case <-s.car.broken():
		return true
	case <-s.done:
		return true
	default:
		return false
	}
}

// reason waits for the end, which the caller has seen signs of, and returns
// why.
func (s *session) reason() error {
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// errEnded is that no stream could be opened because the session is over.
var errEnded = errors.New("session ended")

// open opens a stream. It returns errEnded if nothing was sent because the
// session is over.
func (s *session) open(ctx context.Context) (*stream, error) {
	select {
	case s.slots <- struct{}{}:
	default:
		return nil, errTooManyCalls(s.id)
	}
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		<-s.slots
		return nil, errEnded
	}
	if s.streams++; s.streams == 1 {
		s.quiet = make(chan struct{})
		select {
		case s.busy <- struct{}{}:
		default:
		}
	}
	s.tasks.Add(1) // while s.err is nil, watch runs: no Wait has returned
	s.mu.Unlock()

	raw, err := s.car.dial(ctx)
	s.tasks.Done()
	if err != nil {
		s.release()
		if ctx.Err() == nil && s.ended() {
			return nil, errEnded
		}
		return nil, err
	}
	return &stream{rawStream: raw, s: s}, nil
}

// release is the end of one stream.
func (s *session) release() {
	s.mu.Lock()
	if s.streams--; s.streams == 0 {
		close(s.quiet)
	}
	s.mu.Unlock()
	<-s.slots
}

// drain waits until no stream is open, or ctx is done.
func (s *session) drain(ctx context.Context) {
	s.mu.Lock()
	quiet := s.quiet
	s.mu.Unlock()
	select {
	case <-quiet:
	case <-s.done:
	case <-ctx.Done():
	}
}

// stream is one open stream, a net.Conn. Its errors are faults where the
// session or the agent is to blame.
type stream struct {
	rawStream
	s      *session
	closed atomic.Bool
}

func (st *stream) Read(p []byte) (int, error) {
	n, err := st.rawStream.Read(p)
	if err == nil {
		return n, nil
	}
	if errors.Is(err, io.EOF) && st.complete() {
		return n, io.EOF
	}
	return n, st.explain(err)
}

func (st *stream) Write(p []byte) (int, error) {
	n, err := st.rawStream.Write(p)
	if err != nil {
		err = st.explain(err)
	}
	return n, err
}

func (st *stream) explain(err error) error {
	switch {
	case st.s.ended():
		// Even if the stream was closed: by net/http, perhaps, which met the
		// same end before.
		return st.s.reason()
	case st.closed.Load():
		return net.ErrClosed
	case isTimeout(err):
		return os.ErrDeadlineExceeded
	case errors.Is(err, io.EOF):
		// The carrier ends its streams before it says that it is broken.
		select {
		case <-st.s.car.broken():
			return st.s.reason()
		case <-time.After(time.Second):
		}
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err
	}
	return errReset(st.s.id, err)
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// CloseWrite ends what the agent reads; reading goes on.
func (st *stream) CloseWrite() error {
	if err := st.closeWrite(); err != nil {
		return st.explain(err)
	}
	return nil
}

// Close ends the stream and what waits for it, at once. What the agent needs
// to be told follows behind: a stalled guest must not hold up a caller.
func (st *stream) Close() error {
	if st.closed.Swap(true) {
		return nil
	}
	_ = st.SetDeadline(time.Unix(1, 0)) // it ends pending reads and writes
	st.s.after(func() {
		st.discard()
		st.s.release()
	})
	return nil
}

// after runs f in a goroutine of the session; when that has ended, nothing
// blocks any more and f is run at once.
func (s *session) after(f func()) {
	s.mu.Lock()
	if s.err == nil {
		s.tasks.Go(f)
		s.mu.Unlock()
		return
	}
	s.mu.Unlock()
	<-s.done
	f()
}
