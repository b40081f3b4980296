package port

import (
	"runtime"
	"sync"
)

const (
	// portWrite is the most that the kernel's driver takes in one write.
	portWrite = 32 << 10
	// outboxSize is how much may wait to be written.
	outboxSize = 4 * portWrite
)

// outbox collects what a session sends into writes as large as the driver
// takes. In an emulated guest a write costs some 100 µs whatever its size, as
// each leaves the guest and wakes the host. An HTTP body of 64 MiB in writes of
// 32 KiB came at 97 MB/s when yamux's frames were written one by one and comes
// at 137 MB/s collected, beside 232 MB/s of the raw port (p50 of 7,
// TestRealPort of package link, QEMU 7.2 TCG, two busy cores).
type outbox struct {
	dev  Device
	loop sync.WaitGroup

	mu   sync.Mutex
	cond sync.Cond // any of the fields below changed
	buf  []byte    // of fixed capacity; buf[off:] waits
	off  int
	err  error // the device's, or errOutboxClosed
}

func newOutbox(dev Device) *outbox {
	o := &outbox{dev: dev, buf: make([]byte, 0, outboxSize)}
	o.cond.L = &o.mu
	o.loop.Go(o.run)
	return o
}

// Write appends p, waiting for room. An error of the device may concern what
// was written before.
func (o *outbox) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	total := 0
	for {
		if o.err != nil {
			return total, o.err
		}
		n := min(len(p), cap(o.buf)-len(o.buf))
		if n > 0 {
			o.buf = append(o.buf, p[:n]...)
			o.cond.Broadcast()
		}
		total += n
		if p = p[n:]; len(p) == 0 {
			return total, nil
		}
		o.cond.Wait()
	}
}

// run writes to the device until that fails. It alone moves what is in buf,
// and only while it does not write from it.
func (o *outbox) run() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for o.off == len(o.buf) && o.err == nil {
			o.cond.Wait()
		}
		if len(o.buf)-o.off < portWrite && o.err == nil {
			// Whoever wants to add to it, and is ready to run, comes first.
			o.mu.Unlock()
			runtime.Gosched()
			o.mu.Lock()
		}
		if o.err != nil {
			return
		}
		piece := o.buf[o.off:min(len(o.buf), o.off+portWrite)]
		o.mu.Unlock()
		n, err := o.dev.Write(piece)
		o.mu.Lock()
		o.off += n
		if err != nil && o.err == nil {
			o.err = err
		}
		if o.off == len(o.buf) || cap(o.buf)-len(o.buf) < portWrite {
			o.buf = o.buf[:copy(o.buf, o.buf[o.off:])]
			o.off = 0
		}
		o.cond.Broadcast()
	}
}

// fail makes Write return err, and run end once it is off the device.
func (o *outbox) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
		o.cond.Broadcast()
	}
}
