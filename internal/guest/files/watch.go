package files

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// Bounds of watches. The kernel allows 128 inotify instances to one user, and
// to the kernel all of them are the agent's.
const (
	maxStreams  = 48
	maxPolled   = 48
	maxBuffered = 8192      // events between two polls
	idlePolled  = time.Hour // after which an unpolled watcher makes room
)

// Keepalive intervals that callers may ask for.
const (
	keepaliveHeader = "Keepalive-Ping-Interval"
	minKeepalive    = time.Second
	maxKeepalive    = time.Hour
)

// watcher runs one inotify instance. Its goroutine ends by close, or by itself
// when nothing more can come; done is closed then and err is set.
type watcher struct {
	f    *os.File
	t    *tree
	info func() *users.Names // nil: events carry no entries
	out  sink
	done chan struct{}
	err  error // why it ended by itself; read it after done

	stop sync.Once
	quit chan struct{} // closed by close
}

// sink takes a watcher's events. It returns false when it wants no more, which
// must be soon after quit is closed.
type sink func(e *filesystem.FilesystemEvent, quit <-chan struct{}) bool

// newWatcher starts watching as u. Events go to out, one at a time, once the
// caller has started run; it closes the watcher.
func (s *Service) newWatcher(u users.User, req watchRequest, out sink) (*watcher, error) {
	root, err := resolve(u, req.GetPath())
	if err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", root, err)
	}
	// A nonblocking descriptor: Close ends a Read in progress.
	f := os.NewFile(uintptr(fd), "inotify")
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("watch %s: %w", root, err)
	}
	w := &watcher{
		f:    f,
		t:    newTree(conn, u, root, req.GetRecursive(), req.GetAllowNetworkMounts()),
		out:  out,
		done: make(chan struct{}),
		quit: make(chan struct{}),
	}
	if req.GetIncludeEntry() {
		w.info = s.opt.Accounts.Names
	}
	if err := w.t.start(); err != nil {
		w.f.Close()
		return nil, watchProblem(err)
	}
	return w, nil
}

type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

// run reads events until the watcher ends. It is the watcher's goroutine.
func (w *watcher) run() {
	defer close(w.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := w.f.Read(buf)
		if err != nil {
			w.err = unlessStopped(err)
			return
		}
		if err := w.dispatch(buf[:n]); err != nil {
			w.err = unlessStopped(err)
			return
		}
	}
}

var errStopped = errors.New("nobody wants more events")

func unlessStopped(err error) error {
	if errors.Is(err, errStopped) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

func (w *watcher) dispatch(b []byte) error {
	// One reading of the accounts serves all events of a batch.
	var names *users.Names
	stopped := false
	emit := func(e event) {
		if stopped {
			return
		}
		msg := &filesystem.FilesystemEvent{Name: valid(e.name), Type: e.kind}
		if w.info != nil {
			if names == nil {
				names = w.info()
			}
			msg.Entry = w.t.lookAt(e.name, names)
		}
		stopped = !w.out(msg, w.quit)
	}
	return parse(b, func(wd int32, mask uint32, name string) error {
		if err := w.t.handle(wd, mask, name, emit); err != nil {
			return err
		}
		if stopped {
			return errStopped
		}
		return nil
	})
}

// close ends the watcher and waits for its goroutine.
func (w *watcher) close() {
	w.stop.Do(func() {
		close(w.quit)
		w.f.Close()
	})
	<-w.done
}

// watchProblem says to a caller why a watch did not start or has ended.
func watchProblem(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errWatchGone):
		return problemf(connect.CodeFailedPrecondition, http.StatusConflict, "%v", err)
	case errors.Is(err, errWatchOverflow):
		return problemf(connect.CodeDataLoss, http.StatusInternalServerError, "%v", err)
	case errors.Is(err, errWatchTooMany):
		return problemf(connect.CodeResourceExhausted, http.StatusServiceUnavailable, "%v", err)
	}
	return err
}

// WatchDir streams the changes in a directory, after an event that says that
// the watch is in force. The stream ends without an error when the directory
// itself is removed or renamed, which is reported under the name ".", and with
// data_loss when the caller was too slow for the events.
func (s *Service) WatchDir(ctx context.Context, req *connect.Request[filesystem.WatchDirRequest], stream *connect.ServerStream[filesystem.WatchDirResponse]) error {
	u, err := as(ctx)
	if err != nil {
		return asConnect(err)
	}
	events := make(chan *filesystem.FilesystemEvent, 64)
	w, err := s.newWatcher(u, req.Msg, func(e *filesystem.FilesystemEvent, quit <-chan struct{}) bool {
		// A slow caller fills the kernel's queue, which has a limit.
		select {
		case events <- e:
			return true
		case <-quit:
			return false
		}
	})
	if err != nil {
		return asConnect(err)
	}
	if err := s.addStream(w); err != nil {
		w.f.Close()
		return asConnect(err)
	}
	go w.run()
	defer func() {
		w.close()
		s.mu.Lock()
		delete(s.streams, w)
		s.mu.Unlock()
	}()
	start := &filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Start{Start: &filesystem.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	return pump(ctx, req.Header(), stream, w, events)
}

func pump(ctx context.Context, h http.Header, stream *connect.ServerStream[filesystem.WatchDirResponse], w *watcher, events <-chan *filesystem.FilesystemEvent) error {
	send := func(e *filesystem.FilesystemEvent) error {
		return stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Filesystem{Filesystem: e}})
	}
	var tick <-chan time.Time
	if d := keepalive(h); d > 0 {
		t := time.NewTicker(d)
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case e := <-events:
			if err := send(e); err != nil {
				return err
			}
		case <-tick:
			err := stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Keepalive{Keepalive: &filesystem.WatchDirResponse_KeepAlive{}}})
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-w.done:
			for {
				select {
				case e := <-events:
					if err := send(e); err != nil {
						return err
					}
					continue
				default:
				}
				break
			}
			if w.err == nil || errors.Is(w.err, errWatchGone) {
				return nil
			}
			return asConnect(watchProblem(w.err))
		}
	}
}

// keepalive is the interval that the caller asks for, 0 for none.
func keepalive(h http.Header) time.Duration {
	n, err := strconv.ParseUint(h.Get(keepaliveHeader), 10, 31)
	if err != nil || n == 0 {
		return 0
	}
	return min(max(time.Duration(n)*time.Second, minKeepalive), maxKeepalive)
}

func (s *Service) addStream(w *watcher) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if len(s.streams) >= maxStreams {
		return tooManyWatches(maxStreams)
	}
	s.streams[w] = struct{}{}
	return nil
}

var errClosed = problemf(connect.CodeUnavailable, http.StatusServiceUnavailable, "the agent is shutting down")

func tooManyWatches(n int) error {
	return problemf(connect.CodeResourceExhausted, http.StatusServiceUnavailable, "more than %d directories are being watched", n)
}

// polled is a watcher whose events wait to be fetched.
type polled struct {
	w *watcher

	mu     sync.Mutex
	events []*filesystem.FilesystemEvent
	lost   bool
	polled time.Time
}

// put keeps an event; out of two equal ones in a row it keeps one. When there
// is no room the watch ends: a gap in the middle would pass unseen.
func (p *polled) put(e *filesystem.FilesystemEvent, _ <-chan struct{}) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.events); n > 0 && e.Type == filesystem.EventType_EVENT_TYPE_WRITE &&
		p.events[n-1].Type == e.Type && p.events[n-1].Name == e.Name {
		p.events[n-1] = e
		return true
	}
	if len(p.events) >= maxBuffered {
		p.lost = true
		return false
	}
	p.events = append(p.events, e)
	return true
}

// take hands over what is kept. When nothing is and nothing will come, it says
// why.
func (p *polled) take() ([]*filesystem.FilesystemEvent, error) {
	ended := false
	select {
	case <-p.w.done:
		ended = true
	default:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.polled = time.Now()
	events := p.events
	p.events = nil
	if len(events) > 0 || !ended {
		return events, nil
	}
	if p.lost {
		return nil, watchProblem(errWatchOverflow)
	}
	if p.w.err != nil {
		return nil, watchProblem(p.w.err)
	}
	return nil, errClosed
}

// CreateWatcher starts a watch whose events are fetched with GetWatcherEvents.
func (s *Service) CreateWatcher(ctx context.Context, req *connect.Request[filesystem.CreateWatcherRequest]) (*connect.Response[filesystem.CreateWatcherResponse], error) {
	u, err := as(ctx)
	if err != nil {
		return nil, asConnect(err)
	}
	p := &polled{polled: time.Now()}
	if p.w, err = s.newWatcher(u, req.Msg, p.put); err != nil {
		return nil, asConnect(err)
	}
	id := rand.Text()
	old, err := s.addPolled(id, p)
	if err != nil {
		p.w.f.Close()
		return nil, asConnect(err)
	}
	go p.w.run()
	if old != nil {
		old.w.close()
	}
	return connect.NewResponse(&filesystem.CreateWatcherResponse{WatcherId: id}), nil
}

// addPolled makes room, if need be, by giving up the watcher that nobody has
// polled for the longest time. The caller closes it.
func (s *Service) addPolled(id string, p *polled) (old *polled, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	if len(s.watchers) >= maxPolled {
		oldID, last := "", time.Now().Add(-idlePolled)
		for id, p := range s.watchers {
			p.mu.Lock()
			if p.polled.Before(last) {
				oldID, last = id, p.polled
			}
			p.mu.Unlock()
		}
		if oldID == "" {
			return nil, tooManyWatches(maxPolled)
		}
		old = s.watchers[oldID]
		delete(s.watchers, oldID)
	}
	s.watchers[id] = p
	return old, nil
}

// GetWatcherEvents hands over the events since the call before. A watch that
// has ended says why once its events are fetched: failed_precondition when the
// directory was removed or renamed, data_loss when events were lost.
func (s *Service) GetWatcherEvents(_ context.Context, req *connect.Request[filesystem.GetWatcherEventsRequest]) (*connect.Response[filesystem.GetWatcherEventsResponse], error) {
	s.mu.Lock()
	p, ok := s.watchers[req.Msg.GetWatcherId()]
	s.mu.Unlock()
	if !ok {
		return nil, asConnect(errNoWatcher)
	}
	events, err := p.take()
	if err != nil {
		return nil, asConnect(err)
	}
	return connect.NewResponse(&filesystem.GetWatcherEventsResponse{Events: events}), nil
}

// RemoveWatcher ends a watch.
func (s *Service) RemoveWatcher(_ context.Context, req *connect.Request[filesystem.RemoveWatcherRequest]) (*connect.Response[filesystem.RemoveWatcherResponse], error) {
	id := req.Msg.GetWatcherId()
	s.mu.Lock()
	p, ok := s.watchers[id]
	delete(s.watchers, id)
	s.mu.Unlock()
	if !ok {
		return nil, asConnect(errNoWatcher)
	}
	p.w.close()
	return connect.NewResponse(&filesystem.RemoveWatcherResponse{}), nil
}

var errNoWatcher = absentf("no such watcher")
