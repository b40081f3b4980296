package proc

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/agentiso/agentiso/api/process"
)

const (
	// chunkSize is the most that one read takes and one data event carries:
	// the capacity of a pipe on Linux.
	chunkSize = 64 << 10
	// keepBytes is what is kept of a process's latest output, whether or not
	// anybody has read it.
	keepBytes = 64 << 10
	// logBytes is the most that a process's output takes in memory: what is
	// kept and what its slowest reader has not read. At that point the process
	// waits.
	logBytes = 192 << 10
	// smallSegment is the least that is allocated for a piece of output.
	smallSegment = 256
	// slowReader is how long one reader may hold up others that have read
	// everything.
	slowReader = 30 * time.Second
	// maxReaders is how many streams may be attached to one process.
	maxReaders = 32
)

var (
	errTooManyReaders = errors.New("too many streams are attached to the process")
	errSlowReader     = errors.New("stream was detached: it read nothing for 30s while others waited for it")
	errOutputClosed   = errors.New("agent is shutting down")
)

// kind says where a piece of output came from.
type kind uint8

const (
	stdout kind = iota
	stderr
	terminal
)

// buffers holds the arrays that sources read into and full segments are made
// of.
var buffers = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// output is the latest output of one process: an append-only list of segments,
// bounded by logBytes, with one position per reader.
//
// While nobody is attached the front is dropped and the process never waits.
// With readers attached a segment stays until all of them have sent it, and
// append waits for room: a slow reader slows the process down. A reader that
// holds up another one for slowReader is detached.
type output struct {
	mu      sync.Mutex
	segs    []*segment
	first   uint64 // number of segs[0]
	size    int    // capacity of all segs
	readers map[*reader]struct{}
	end     *process.ProcessEvent_EndEvent
	closed  bool
	room    chan struct{} // closed, and replaced, when append may try again
}

// segment is a piece of output of one kind. Its bytes never change once
// written; bytes are added behind them while there is capacity.
type segment struct {
	kind kind
	data []byte
	// array is the pooled array behind data; nil if data is not from the pool.
	array *[chunkSize]byte
}

// reader is one attached stream.
type reader struct {
	out  *output
	more chan struct{} // capacity 1: there may be something to take
	seg  uint64        // position: number of the segment
	off  int           // and the offset in it
	last time.Time     // of the last progress
	err  error         // why it was detached
}

func newOutput() *output {
	return &output{readers: make(map[*reader]struct{}), room: make(chan struct{})}
}

// attach adds a reader of what comes from now on, or of what is kept and what
// comes.
func (o *output) attach(replay bool) (*reader, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.readers) >= maxReaders {
		return nil, errTooManyReaders
	}
	r := &reader{out: o, more: make(chan struct{}, 1), last: time.Now()}
	r.seg = o.first
	if n := len(o.segs); n > 0 && !replay {
		r.seg, r.off = o.first+uint64(n-1), len(o.segs[n-1].data)
	}
	o.readers[r] = struct{}{}
	// One that waits for its only reader must now look at the clock as well.
	o.signalRoom()
	return r, nil
}

// detach ends r. What r has taken last may still be read: its memory is not
// used again.
func (o *output) detach(r *reader, why error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.detachLocked(r, why)
}

func (o *output) detachLocked(r *reader, why error) {
	if _, ok := o.readers[r]; !ok {
		return
	}
	delete(o.readers, r)
	r.err = why
	if i := r.seg - o.first; i < uint64(len(o.segs)) {
		o.segs[i].array = nil
	}
	wake(r.more)
	o.trim()
}

// append adds b[:n] and takes b over. It waits while a reader has no room; it
// fails only when the output was closed.
func (o *output) append(k kind, b *[chunkSize]byte, n int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var blocked time.Time
	for {
		if o.closed {
			buffers.Put(b)
			return errOutputClosed
		}
		o.trim()
		if o.put(k, b, n) {
			for r := range o.readers {
				wake(r.more)
			}
			return nil
		}
		if blocked.IsZero() {
			blocked = time.Now()
		}
		o.waitRoom(blocked)
	}
}

// put adds b[:n] if there is room.
func (o *output) put(k kind, b *[chunkSize]byte, n int) bool {
	var last *segment
	if len(o.segs) > 0 {
		last = o.segs[len(o.segs)-1]
	}
	if last != nil && last.kind == k && cap(last.data)-len(last.data) >= n {
		last.data = append(last.data, b[:n]...)
		buffers.Put(b)
		return true
	}
	s := &segment{kind: k}
	size := chunkSize
	if small := n < chunkSize/4; small {
		// Segments grow while a stream goes on in small pieces, so that a
		// reader that lags gets few large events.
		size = max(n, smallSegment)
		if last != nil && last.kind == k {
			size = max(n, min(2*cap(last.data), chunkSize/4))
		}
	}
	if o.size > 0 && o.size+size > logBytes {
		return false
	}
	if size == chunkSize {
		s.data, s.array = b[:n], b
	} else {
		s.data = append(make([]byte, 0, size), b[:n]...)
		buffers.Put(b)
	}
	o.segs = append(o.segs, s)
	o.size += cap(s.data)
	return true
}

// trim drops segments from the front that every reader has passed, down to
// keepBytes.
func (o *output) trim() {
	oldest := o.first + uint64(len(o.segs))
	for r := range o.readers {
		oldest = min(oldest, r.seg)
	}
	n := 0
	for n < len(o.segs) && o.first < oldest && o.size-cap(o.segs[n].data) >= keepBytes {
		s := o.segs[n]
		o.size -= cap(s.data)
		if s.array != nil {
			buffers.Put(s.array)
		}
		o.segs[n] = nil
		o.first++
		n++
	}
	if n > 0 {
		o.segs = append(o.segs[:0], o.segs[n:]...)
		clear(o.segs[len(o.segs):cap(o.segs)])
		o.signalRoom()
	}
}

func (o *output) signalRoom() {
	close(o.room)
	o.room = make(chan struct{})
}

// waitRoom waits, with the lock released, until a segment was dropped or a
// reader that stands in others' way has had its time.
func (o *output) waitRoom(blocked time.Time) {
	room := o.room
	var timeout <-chan time.Time
	if len(o.readers) > 1 {
		for r := range o.readers {
			held := time.Since(latest(r.last, blocked))
			if o.caughtUp(r) || held < slowReader {
				continue
			}
			for other := range o.readers {
				if o.caughtUp(other) {
					o.detachLocked(r, errSlowReader)
					return
				}
			}
		}
		t := time.NewTimer(slowReader / 10)
		defer t.Stop()
		timeout = t.C
	}
	o.mu.Unlock()
	select {
	case <-room:
	case <-timeout:
	}
	o.mu.Lock()
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (o *output) caughtUp(r *reader) bool {
	n := len(o.segs)
	return n == 0 || r.seg == o.first+uint64(n-1) && r.off == len(o.segs[n-1].data)
}

// finish adds the end: readers get it after the rest.
func (o *output) finish(end *process.ProcessEvent_EndEvent) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.end = end
	for r := range o.readers {
		wake(r.more)
	}
}

// close detaches everybody and makes append fail.
func (o *output) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return
	}
	o.closed = true
	o.signalRoom()
	for r := range o.readers {
		o.detachLocked(r, errOutputClosed)
	}
}

// piece is what take found: bytes, the end, or neither.
type piece struct {
	kind kind
	data []byte
	end  *process.ProcessEvent_EndEvent
}

// take returns the next bytes without advancing: they stay valid until taken is
// called, or for ever if r is detached meanwhile.
func (r *reader) take() (piece, error) {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.err != nil {
		return piece{}, r.err
	}
	for i := r.seg - o.first; i < uint64(len(o.segs)); i++ {
		s := o.segs[i]
		if r.off < len(s.data) {
			return piece{kind: s.kind, data: s.data[r.off:len(s.data):len(s.data)]}, nil
		}
		if i+1 == uint64(len(o.segs)) {
			break
		}
		r.seg, r.off = r.seg+1, 0
	}
	return piece{end: o.end}, nil
}

// taken advances by n bytes that take returned.
func (r *reader) taken(n int) {
	o := r.out
	o.mu.Lock()
	defer o.mu.Unlock()
	r.last = time.Now()
	r.off += n
	if i := r.seg - o.first; i+1 < uint64(len(o.segs)) && r.off == len(o.segs[i].data) {
		r.seg, r.off = r.seg+1, 0
	}
	if r.err == nil {
		o.trim()
	}
}

// follow sends r's output until its end, with a keepalive whenever nothing was
// sent for that interval (0: none). It returns nil after the end was sent, the
// context's error, or that of send.
func (r *reader) follow(ctx context.Context, keepalive time.Duration, send func(*process.ProcessEvent) error) error {
	var tick <-chan time.Time
	var timer *time.Timer
	if keepalive > 0 {
		timer = time.NewTimer(keepalive)
		defer timer.Stop()
		tick = timer.C
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := r.take()
		var ev *process.ProcessEvent
		switch {
		case err != nil:
			return err
		case p.data != nil:
			ev = dataEvent(p)
		case p.end != nil:
			return send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: p.end}})
		default:
			select {
			case <-r.more:
				continue
			case <-ctx.Done():
				continue
			case <-tick:
				ev = &process.ProcessEvent{Event: &process.ProcessEvent_Keepalive{Keepalive: &process.ProcessEvent_KeepAlive{}}}
			}
		}
		if err := send(ev); err != nil {
			return err
		}
		r.taken(len(p.data))
		if timer != nil {
			timer.Reset(keepalive)
		}
	}
}

func dataEvent(p piece) *process.ProcessEvent {
	d := &process.ProcessEvent_DataEvent{}
	switch p.kind {
	case stdout:
		d.Output = &process.ProcessEvent_DataEvent_Stdout{Stdout: p.data}
	case stderr:
		d.Output = &process.ProcessEvent_DataEvent_Stderr{Stderr: p.data}
	case terminal:
		d.Output = &process.ProcessEvent_DataEvent_Pty{Pty: p.data}
	}
	return &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}}
}

// wake signals a channel of capacity 1.
func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
