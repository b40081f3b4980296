package port

import (
	"bufio"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/link/wire"
)

const (
	// bindTries and bindPause are how often and how far apart the bind is
	// tried while the vsock modules load.
	bindTries = 20
	bindPause = 50 * time.Millisecond

	// keyWait is how long a connection may take to show its key.
	keyWait = 5 * time.Second
	// maxUnproven is how many connections may be at it at once.
	maxUnproven = 64
)

// VsockOptions are [Options] and what tests need.
type VsockOptions struct {
	Options
	// AllowLocal also accepts connections from inside the guest (CID 1). It
	// is for tests: with it, any process of the guest that comes first owns
	// the agent.
	AllowLocal bool
}

// Vsock is a net.Listener on AF_VSOCK, port 5000. The first key that a
// connection from the host shows becomes the key; it is pinned before any
// other can be taken, because whoever starts the machine connects first.
type Vsock struct {
	*queue
	opts  VsockOptions
	l     net.Listener
	tasks sync.WaitGroup
	slots chan struct{} // maxUnproven

	mu   sync.Mutex
	key  *wire.Nonce           // nil until the first connection
	held map[net.Conn]struct{} // not handed to Accept
}

// ListenVsock binds port 5000, trying 20 times at intervals of 50 ms while
// the kernel's modules come up. When it has failed the caller falls back to
// the serial port.
func ListenVsock(ctx context.Context, opts VsockOptions) (*Vsock, error) {
	tick := time.NewTicker(bindPause)
	defer tick.Stop()
	for try := 1; ; try++ {
		// Any CID: a copy of this machine has another one.
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, wire.VsockPort, nil)
		if err == nil {
			return NewVsock(l, opts), nil
		}
		err = fmt.Errorf("bind vsock port %d: %w", wire.VsockPort, err)
		if try == bindTries {
			return nil, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// NewVsock serves connections accepted from l, which it closes in the end.
func NewVsock(l net.Listener, opts VsockOptions) *Vsock {
	v := &Vsock{
		queue: newQueue(), opts: opts, l: l,
		slots: make(chan struct{}, maxUnproven), held: map[net.Conn]struct{}{},
	}
	v.tasks.Go(v.run)
	return v
}

// Addr says that it is a vsock link.
func (v *Vsock) Addr() net.Addr { return addr("vsock") }

// Close stops listening. Connections already accepted are their owners'.
func (v *Vsock) Close() error {
	v.end(net.ErrClosed)
	err := v.l.Close()
	v.mu.Lock()
	for c := range v.held {
		_ = c.Close() // ends its task
	}
	v.mu.Unlock()
	v.tasks.Wait()
	return err
}

func (v *Vsock) run() {
	for {
		c, err := v.l.Accept()
		if err != nil {
			v.end(fmt.Errorf("accept on vsock: %w", err))
			return
		}
		if !v.fromHost(c) {
			v.opts.log().Warn("link connection refused", "err", "not from the host", "peer", c.RemoteAddr())
			_ = c.Close()
			continue
		}
		select {
		case v.slots <- struct{}{}:
			v.tasks.Go(func() {
				v.admit(c)
			})
		default:
			_ = c.Close() // somebody floods; the host tries again
		}
	}
}

func (v *Vsock) fromHost(c net.Conn) bool {
	a, ok := c.RemoteAddr().(*vsock.Addr)
	if !ok {
		return v.opts.AllowLocal
	}
	return a.ContextID == vsock.Host || a.ContextID == vsock.Local && v.opts.AllowLocal
}

// admit reads c's key and hands c on if it is the right one.
func (v *Vsock) admit(c net.Conn) {
	defer func() { <-v.slots }()
	v.mu.Lock()
	v.held[c] = struct{}{}
	if v.ended() { // Close may have missed it
		_ = c.Close()
	}
	v.mu.Unlock()
	_ = c.SetDeadline(time.Now().Add(keyWait))
	f, err := readKey(c)
	if err == nil && !v.trust(f.Nonce) {
		err = errors.New("wrong key")
	}
	if err == nil && f.Mode != wire.Mux {
		err = rawConn(c, f)
	}
	v.mu.Lock()
	delete(v.held, c)
	v.mu.Unlock()
	if err != nil || f.Mode != wire.Mux {
		v.opts.log().Info("link connection ended", "mode", string(f.Mode), "err", err, "peer", c.RemoteAddr())
		_ = c.Close()
		return
	}
	_ = c.SetDeadline(time.Time{})
	v.put(c, nil)
}

// trust reports whether key is the key, which the first one becomes.
func (v *Vsock) trust(key wire.Nonce) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.key == nil {
		v.key = &key
		return true
	}
	return subtle.ConstantTimeCompare(v.key[:], key[:]) == 1
}

// readKey reads a connection's first frame and not a byte more.
func readKey(r io.Reader) (wire.Frame, error) {
	var b [wire.FrameSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return wire.Frame{}, fmt.Errorf("read key: %w", err)
	}
	f, err := wire.ParseFrame(b[:])
	if err != nil {
		return f, fmt.Errorf("read key: %w", err)
	}
	if f.Kind != wire.Key || f.Version != wire.Version {
		return f, fmt.Errorf("read key: frame %c of version %d, want K of %d", f.Kind, f.Version, wire.Version)
	}
	return f, nil
}

// rawConn serves a measurement on a connection of its own.
func rawConn(c net.Conn, f wire.Frame) error {
	c = progress{c}
	var err error
	switch f.Mode {
	case wire.Sink:
		if _, err = io.CopyN(io.Discard, c, f.Size); err == nil {
			_, err = c.Write([]byte{wire.SinkDone})
		}
	case wire.Source:
		_, err = io.CopyBuffer(c, io.LimitReader(zeros{}, f.Size), make([]byte, rawBuffer))
	case wire.Echo:
		_, err = io.Copy(c, io.LimitReader(bufio.NewReaderSize(c, rawBuffer), f.Size))
	}
	return err
}

// progress is a connection that must move within wire.WriteLimit.
type progress struct{ net.Conn }

func (p progress) Read(b []byte) (int, error) {
	_ = p.SetDeadline(time.Now().Add(wire.WriteLimit))
	return p.Conn.Read(b)
}

func (p progress) Write(b []byte) (int, error) {
	_ = p.SetDeadline(time.Now().Add(wire.WriteLimit))
	return p.Conn.Write(b)
}

// zeros reads as zero bytes without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
