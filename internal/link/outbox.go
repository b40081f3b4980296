package link

import (
	"io"
	"sync"

	"github.com/agentiso/agentiso/internal/link/wire"
)

const (
	// outboxMost is never reached: yamux sends no more data than the guest has
	// granted, and control frames are few beside it.
	outboxMost = 2 * wire.MaxStreams * wire.MaxWindow
	// outboxKeep is how large a buffer is kept once it is empty.
	outboxKeep = 1 << 20
)

// outbox is what waits to be written to a serial link. It takes everything at
// once, so that yamux never waits for the channel: its calls could not be
// interrupted then, and a guest that stops reading would hold every caller
// for wire.WriteLimit. What is waiting is bounded by the windows of the calls
// in progress.
type outbox struct {
	w    io.Writer
	loop sync.WaitGroup

	mu      sync.Mutex
	cond    sync.Cond
	waiting []byte
	err     error
}

func newOutbox(w io.Writer) *outbox {
	o := &outbox{w: w}
	o.cond.L = &o.mu
	o.loop.Go(o.run)
	return o
}

// write appends to what waits. An error may concern what was written before.
func (o *outbox) write(bs ...[]byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, b := range bs {
		if o.err == nil && len(o.waiting)+len(b) > outboxMost {
			o.err = io.ErrShortBuffer
		}
		if o.err != nil {
			return o.err
		}
		o.waiting = append(o.waiting, b...)
	}
	o.cond.Signal()
	return nil
}

func (o *outbox) run() {
	var going []byte
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.waiting) == 0 && o.err == nil {
			o.cond.Wait()
		}
		if o.err != nil {
			return
		}
		going, o.waiting = o.waiting, going[:0]
		o.mu.Unlock()
		_, err := o.w.Write(going)
		if cap(going) > outboxKeep {
			going = nil
		}
		o.mu.Lock()
		if err != nil && o.err == nil {
			o.err = err
		}
	}
}

// close ends run, which a write in progress delays until the channel is
// closed. It does not wait.
func (o *outbox) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = io.ErrClosedPipe
	}
	o.cond.Signal()
}

// failure returns why writing ended, or nil.
func (o *outbox) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}
