package qemu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// consoleLimit is where a console's file is rotated; one predecessor is kept,
// so a guest that floods its console fills two files of this size.
const consoleLimit = 1 << 20

// A console keeps what the machines of one workspace print: raw bytes from a
// hostile guest, in <dir>/<id>.log and, before that, <id>.log.1. Offsets count
// from the first byte that is kept when the console is opened.
type console struct {
	path  string
	limit int64

	mu       sync.Mutex
	f        *os.File      // the present file, open while a machine is connected
	prevSize int64         // of the predecessor
	base     int64         // offset of the present file's first byte
	size     int64         // of the present file
	start    int64         // offset where the present machine's output begins
	live     int           // machines whose output may still come
	failed   error         // the first write that failed, since the last that did not
	changed  chan struct{} // closed to wake those who wait
	waited   bool          // somebody has been given changed
}

// openConsole finds what is kept already.
func openConsole(dir, id string, limit int64) *console {
	c := &console{path: filepath.Join(dir, id+".log"), limit: limit, changed: make(chan struct{})}
	if st, err := os.Stat(c.path + ".1"); err == nil {
		c.prevSize = st.Size()
		c.base = c.prevSize
	}
	if st, err := os.Stat(c.path); err == nil {
		c.size = st.Size()
	}
	return c
}

// begin prepares for the output of a machine; end must follow. fresh says that
// the machine is new, so that Tail shows nothing of the one before.
func (c *console) begin(fresh bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f == nil {
		f, err := os.OpenFile(c.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err != nil {
			return fmt.Errorf("open console log: %w", err)
		}
		c.f = f
	}
	if fresh {
		c.start = c.base + c.size
	}
	c.live++
	return nil
}

// end says that no more will come from a machine for which begin was called.
func (c *console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.live--
	if c.live == 0 && c.f != nil {
		_ = c.f.Close() // every write has been checked
		c.f = nil
	}
	c.wake()
}

// Write keeps p. It never refuses: what cannot be written (the host's disk is
// full) is dropped, so that the guest is not held up by its console. The error
// reports the first such loss of a series.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f == nil {
		return len(p), nil // removed meanwhile
	}
	n, err := c.write(p)
	c.size += int64(n)
	if n > 0 {
		c.wake()
	}
	report := err != nil && c.failed == nil
	c.failed = err
	if report {
		return len(p), err
	}
	return len(p), nil
}

func (c *console) write(p []byte) (int, error) {
	if c.size > 0 && c.size+int64(len(p)) > c.limit {
		if err := os.Rename(c.path, c.path+".1"); err != nil {
			return 0, err
		}
		c.prevSize = c.size
		c.base += c.size
		c.size = 0
		f, err := os.OpenFile(c.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return 0, err
		}
		_ = c.f.Close()
		c.f = f
	}
	return c.f.Write(p)
}

// wake tells every follower to look again.
func (c *console) wake() {
	if c.waited {
		close(c.changed)
		c.changed = make(chan struct{})
		c.waited = false
	}
}

// tailFrom is the offset of the last n bytes, of the present machine's alone if
// own is set.
func (c *console) tailFrom(n int64, own bool) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	from := max(c.base-c.prevSize, c.base+c.size-max(0, n))
	if own {
		from = max(from, c.start)
	}
	return from
}

// read reads at offset from, or at the first byte still kept if that comes
// later, and returns the offset after what it has read. At the end it returns
// no bytes, a channel that is closed when there may be more, and whether more
// may come at all.
func (c *console) read(p []byte, from int64) (n int, next int64, changed <-chan struct{}, live bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	from = min(max(from, c.base-c.prevSize), c.base+c.size) // rotated away, or removed
	path, at, size := c.path, from-c.base, c.size
	if at < 0 {
		path, at, size = c.path+".1", at+c.prevSize, c.prevSize
	}
	if p = p[:min(int64(len(p)), size-at)]; len(p) == 0 {
		c.waited = true
		return 0, from, c.changed, c.live > 0, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, from, nil, false, err
	}
	defer f.Close()
	n, err = f.ReadAt(p, at)
	if n > 0 || errors.Is(err, io.EOF) {
		err = nil
	}
	return n, from + int64(n), c.changed, c.live > 0, err
}

// remove deletes what is kept; later output is dropped.
func (c *console) remove() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f != nil {
		_ = c.f.Close()
		c.f = nil
	}
	c.base, c.size, c.prevSize, c.start = 0, 0, 0, 0
	c.wake()
	var errs []error
	for _, p := range []string{c.path, c.path + ".1"} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove console log: %w", err))
		}
	}
	return errors.Join(errs...)
}
