package port_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/internal/guest/port"
	"github.com/agentiso/agentiso/internal/guest/port/porttest"
	"github.com/agentiso/agentiso/internal/link/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t testing.TB) (l *port.Serial, p *porttest.Port, sock string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "port")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock = filepath.Join(dir, "s")
	if p, err = porttest.Listen(sock); err != nil {
		t.Fatal(err)
	}
	l = port.NewSerial(p, port.Options{})
	t.Cleanup(func() {
		l.Close()
		p.Close()
	})
	return l, p, sock
}

// host is a connection of the host's and what comes over it.
type host struct {
	net.Conn
	r    *bufio.Reader
	scan *wire.Scanner
}

func dial(t testing.TB, sock string) *host {
	t.Helper()
	c, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	r := bufio.NewReader(c)
	return &host{c, r, wire.NewScanner(r, -1)}
}

func (h *host) Read(p []byte) (int, error) { return h.r.Read(p) }

func (h *host) send(t testing.TB, kind wire.Kind, nonce byte, mode wire.Mode, size int64) {
	t.Helper()
	f := wire.Frame{Kind: kind, Mode: mode, Version: wire.Version, Nonce: wire.Nonce{nonce}, Size: size}
	if _, err := h.Write(f.Append(nil)); err != nil {
		t.Fatal(err)
	}
}

// want skips to a frame that is no BYE, which must be this one.
func (h *host) want(t testing.TB, kind wire.Kind, nonce byte) {
	t.Helper()
	for {
		f, err := h.scan.Next()
		if err != nil {
			t.Fatalf("wait for %c: %v", kind, err)
		}
		if f.Kind == wire.Bye {
			continue
		}
		if f.Kind != kind || f.Nonce != (wire.Nonce{nonce}) || f.Version != wire.Version {
			t.Fatalf("got %+v, want %c with nonce %d", f, kind, nonce)
		}
		return
	}
}

func (h *host) mux(t testing.TB, nonce byte) *yamux.Session {
	t.Helper()
	h.send(t, wire.Start, nonce, wire.Mux, 0)
	h.want(t, wire.Started, nonce)
	y, err := yamux.Client(h, wire.HostConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { y.Close() })
	return y
}

// works has one stream say hello through the listener.
func works(t testing.TB, l net.Listener, y *yamux.Session) {
	t.Helper()
	st, err := y.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := st.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Fatalf("read %q, %v", b, err)
	}
}

func TestHandshake(t *testing.T) {
	l, _, sock := start(t)
	h := dial(t, sock)
	if _, err := h.Write(append(bytes.Repeat([]byte{0, 0xa6, 'x'}, 3000), "\xa6isolinkH"...)); err != nil {
		t.Fatal(err)
	}
	h.send(t, wire.Start, 1, wire.Mux, 0) // without a hello: nothing
	h.send(t, wire.Hello, 1, wire.Mux, 0)
	h.want(t, wire.Welcome, 1)
	h.send(t, wire.Hello, 1, wire.Mux, 0) // a copy: no second answer
	h.send(t, wire.Start, 2, wire.Mux, 0) // of another nonce: nothing
	h.send(t, wire.Hello, 3, wire.Mux, 0) // begins again
	h.want(t, wire.Welcome, 3)
	h.send(t, wire.Start, 1, wire.Mux, 0) // too late
	works(t, l, h.mux(t, 3))
}

// A new hello ends a session from wherever in it the host left.
func TestHelloEndsSession(t *testing.T) {
	for _, cut := range []int{0, 1, wire.HeaderSize, wire.HeaderSize + 1, wire.HeaderSize + 40} {
		l, _, sock := start(t)
		h := dial(t, sock)
		h.send(t, wire.Hello, 1, wire.Mux, 0)
		h.want(t, wire.Welcome, 1)
		h.send(t, wire.Start, 1, wire.Mux, 0)
		h.want(t, wire.Started, 1)
		// SYN with the first of 64 KiB of data, cut short.
		frame := append([]byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0}, make([]byte, 64)...)
		if _, err := h.Write(frame[:cut]); err != nil {
			t.Fatal(err)
		}
		f := wire.Frame{Kind: wire.Hello, Mode: wire.Mux, Version: wire.Version, Nonce: wire.Nonce{2}}
		if _, err := h.Write(f.AppendCopies(nil, wire.Drain)); err != nil {
			t.Fatal(err)
		}
		h.want(t, wire.Welcome, 2)
		works(t, l, h.mux(t, 2))
	}
}

func TestHostLeavesInMeasurement(t *testing.T) {
	for _, mode := range []wire.Mode{wire.Sink, wire.Source, wire.Echo} {
		l, p, sock := start(t)
		p.Unseen = mode != wire.Source // both ways of noticing
		h := dial(t, sock)
		h.send(t, wire.Hello, 1, mode, wire.MaxRawBytes)
		h.want(t, wire.Welcome, 1)
		h.send(t, wire.Start, 1, mode, wire.MaxRawBytes)
		h.want(t, wire.Started, 1)
		if _, err := h.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		h.Close()
		h = dial(t, sock)
		h.send(t, wire.Hello, 2, wire.Mux, 0)
		h.want(t, wire.Welcome, 2)
		works(t, l, h.mux(t, 2))
	}
}

func TestCloseTellsHost(t *testing.T) {
	l, _, sock := start(t)
	h := dial(t, sock)
	h.send(t, wire.Hello, 1, wire.Mux, 0)
	h.want(t, wire.Welcome, 1)
	h.send(t, wire.Start, 1, wire.Mux, 0)
	h.want(t, wire.Started, 1)
	bye := make(chan error, 1)
	go func() {
		f, err := h.scan.Next()
		if err == nil && f.Kind != wire.Bye {
			err = errors.New("not a BYE")
		}
		bye <- err
		_, _ = io.Copy(io.Discard, h)
	}()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-bye; err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

// FuzzHostBytes: whatever comes, the next host is served.
func FuzzHostBytes(f *testing.F) {
	hello := wire.Frame{Kind: wire.Hello, Mode: wire.Mux, Version: wire.Version, Nonce: wire.Nonce{1}}
	for _, mode := range []wire.Mode{wire.Mux, wire.Sink, wire.Source, wire.Echo} {
		st := hello
		st.Kind, st.Mode, st.Size = wire.Start, mode, 10
		b := st.Append(hello.Append(nil))
		f.Add(b)
		f.Add(append(b, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0))
		f.Add(append(b, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 9, 'x'))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		l, _, sock := start(t)
		h := dial(t, sock)
		if _, err := h.Write(b); err != nil {
			t.Fatal(err)
		}
		h.Close()
		h = dial(t, sock)
		h.send(t, wire.Hello, 9, wire.Mux, 0)
		h.want(t, wire.Welcome, 9)
		y := h.mux(t, 9)
		go func() { // streams of the input's own session may come first
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = io.Copy(c, c)
					c.Close()
				}()
			}
		}()
		st, err := y.Open()
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		if _, err := st.Write([]byte("hi")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(st, make([]byte, 2)); err != nil {
			t.Fatal(err)
		}
	})
}
