package port

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/agentiso/agentiso/internal/link/wire"
)

// listenUnix serves the vsock listener's protocol on a Unix socket.
func listenUnix(t testing.TB) (*Vsock, func() net.Conn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vs")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	v := NewVsock(l, VsockOptions{AllowLocal: true})
	t.Cleanup(func() {
		v.Close()
		os.RemoveAll(dir)
	})
	return v, func() net.Conn {
		c, err := net.Dial("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	}
}

func show(t testing.TB, c net.Conn, key byte, mode wire.Mode, size int64) {
	t.Helper()
	f := wire.Frame{Kind: wire.Key, Mode: mode, Version: wire.Version, Nonce: wire.Nonce{key}, Size: size}
	if _, err := c.Write(f.Append(nil)); err != nil {
		t.Fatal(err)
	}
}

func refused(t *testing.T, what string, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s was not refused: %d, %v", what, n, err)
	}
}

func TestVsockKey(t *testing.T) {
	v, dial := listenUnix(t)
	for i := range 3 { // the first pins the key
		c := dial()
		show(t, c, 1, wire.Mux, 0)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		got, err := v.Accept()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		if _, err := io.ReadFull(got, b); err != nil || b[0] != 'x' {
			t.Fatalf("connection %d: read %q, %v", i, b, err)
		}
		got.Close()
	}
	wrong := dial()
	show(t, wrong, 2, wire.Mux, 0)
	refused(t, "a wrong key", wrong)

	garbage := dial()
	if _, err := garbage.Write(make([]byte, wire.FrameSize)); err != nil {
		t.Fatal(err)
	}
	refused(t, "garbage", garbage)

	other := dial()
	f := wire.Frame{Kind: wire.Hello, Mode: wire.Mux, Version: wire.Version, Nonce: wire.Nonce{1}}
	if _, err := other.Write(f.Append(nil)); err != nil {
		t.Fatal(err)
	}
	refused(t, "a hello", other)

	short := dial()
	show(t, short, 1, wire.Echo, 3)
	if _, err := short.Write([]byte("abcd")); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(io.LimitReader(short, 3)); string(b) != "abc" || err != nil {
		t.Errorf("echo: %q, %v", b, err)
	}
}

// Connections that show nothing end with the listener and do not hold up
// those that do.
func TestVsockSilentConnections(t *testing.T) {
	v, dial := listenUnix(t)
	for range maxUnproven / 2 {
		dial()
	}
	c := dial()
	show(t, c, 1, wire.Mux, 0)
	got, err := v.Accept()
	if err != nil {
		t.Fatal(err)
	}
	got.Close()
	for range maxUnproven { // the rest is refused
		dial()
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

type fakeConn struct {
	net.Conn
	peer net.Addr
}

func (c fakeConn) RemoteAddr() net.Addr { return c.peer }

func TestVsockPeers(t *testing.T) {
	for _, tt := range []struct {
		cid         uint32
		allow, want bool
	}{
		{vsock.Host, false, true},
		{vsock.Host, true, true},
		{vsock.Local, false, false},
		{vsock.Local, true, true},
		{vsock.Hypervisor, true, false},
		{57, true, false},
	} {
		v := &Vsock{opts: VsockOptions{AllowLocal: tt.allow}}
		if got := v.fromHost(fakeConn{peer: &vsock.Addr{ContextID: tt.cid}}); got != tt.want {
			t.Errorf("CID %d, AllowLocal %v: %v, want %v", tt.cid, tt.allow, got, tt.want)
		}
	}
}

func FuzzKey(f *testing.F) {
	good := wire.Frame{Kind: wire.Key, Mode: wire.Mux, Version: wire.Version, Nonce: wire.Nonce{1}}
	f.Add(good.Append(nil))
	f.Add(good.Append(nil)[:67])
	good.Kind = wire.Hello
	f.Add(good.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, c := net.Pipe()
		defer a.Close()
		go func() {
			_, _ = c.Write(b)
			c.Close()
		}()
		got, err := readKey(a)
		if err == nil && (got.Kind != wire.Key || got.Version != wire.Version || len(b) < wire.FrameSize) {
			t.Errorf("took %q for a key: %+v", b, got)
		}
	})
}
