package link_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/guest/port"
	"github.com/agentiso/agentiso/internal/link"
	"github.com/agentiso/agentiso/internal/link/wire"
)

func vsockEndpoint(cid uint32, key byte) domain.Endpoint {
	return domain.Endpoint{Kind: domain.LinkVsock, CID: cid, Key: bytes.Repeat([]byte{key}, 16)}
}

// serveVsock serves an agent on l.
func serveVsock(t testing.TB, l net.Listener) (stop func()) {
	t.Helper()
	srv := &http.Server{Handler: agentMux()}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	stop = sync.OnceFunc(func() {
		srv.Close()
		wg.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// exercise makes calls of every kind over a vsock link.
func exercise(t *testing.T, h *link.Hub) {
	t.Helper()
	ctx := within(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			resp, err := get(ctx, h.Transport("w"), "/download?n=1000000")
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if n, err := io.Copy(io.Discard, resp.Body); n != 1e6 || err != nil {
				t.Errorf("read %d, %v", n, err)
			}
		})
	}
	wg.Wait()
	req, _ := http.NewRequestWithContext(ctx, "POST", "http://agent/upload", io.LimitReader(endless{}, 3e6))
	resp, err := h.Transport("w").RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != "3000000" || err != nil {
		t.Errorf("upload: %q, %v", b, err)
	}
	resp.Body.Close()
	for _, mode := range []wire.Mode{wire.Sink, wire.Source, wire.Echo} {
		n := int64(1 << 20)
		if mode == wire.Echo {
			n = 50
		}
		if d, err := h.Raw(ctx, "w", mode, n); err != nil {
			t.Errorf("raw %c: %v", mode, err)
		} else {
			t.Logf("raw %c of %d bytes: %v", mode, n, d)
		}
	}
	healthy(t, h, "w")
}

func TestVsock(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	ul, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	stop := serveVsock(t, port.NewVsock(ul, port.VsockOptions{AllowLocal: true}))
	var gone atomic.Bool
	h := newHub(t, link.Options{}.DialingVsock(func(ctx context.Context, cid uint32) (net.Conn, error) {
		if gone.Load() {
			return nil, &net.OpError{Op: "dial", Net: "vsock", Err: syscall.ENODEV}
		}
		if cid != 100 {
			return nil, fmt.Errorf("dialed CID %d", cid)
		}
		var d net.Dialer
		return d.DialContext(ctx, "unix", sock)
	}))
	if err := h.Open("w", vsockEndpoint(100, 7)); err != nil {
		t.Fatal(err)
	}
	exercise(t, h)

	t.Run("another user of the host", func(t *testing.T) {
		if err := h.Open("x", vsockEndpoint(100, 8)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := get(ctx, h.Transport("x"), "/health")
		wantFault(t, err, fault.Timeout, "the agent closed the connection")
	})
	t.Run("close", func(t *testing.T) {
		resp, err := get(within(t), h.Transport("w"), "/hang")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		h.Close("w")
		_, err = io.ReadAll(resp.Body)
		wantFault(t, err, fault.Unavailable, "was closed")
		if err := h.Open("w", vsockEndpoint(100, 7)); err != nil {
			t.Fatal(err)
		}
		healthy(t, h, "w")
	})
	stop()
	gone.Store(true)
	eventually(t, "the machine's end to show", func() bool {
		_, err := get(within(t), h.Transport("w"), "/health")
		return err != nil && fault.Is(err, fault.Unavailable) && errors.Is(err, syscall.ENODEV)
	})
}

// An agent whose kernel has no vsock listens on the serial port.
func TestVsockFallsBackToSerial(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	startGuest(t, sock, agentMux(), false)
	h := newHub(t, link.Options{}.DialingVsock(func(context.Context, uint32) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: "vsock", Err: syscall.ECONNRESET}
	}))
	ep := vsockEndpoint(100, 1)
	ep.Socket = sock
	if err := h.Open("w", ep); err != nil {
		t.Fatal(err)
	}
	exercise(t, h)
}

// An agent that accepts and then is silent ends pending calls, too.
func TestVsockStall(t *testing.T) {
	var frozen atomic.Bool
	h := newHub(t, link.Options{Stall: 200 * time.Millisecond, Ping: 20 * time.Millisecond}.DialingVsock(
		func(context.Context, uint32) (net.Conn, error) {
			a, b := net.Pipe()
			go func() {
				defer b.Close()
				key := make([]byte, wire.FrameSize)
				if _, err := io.ReadFull(b, key); err != nil {
					return
				}
				if f, _ := wire.ParseFrame(key); f.Mode == wire.Echo && !frozen.Load() {
					_, _ = io.CopyN(b, b, 1)
				}
				_, _ = io.Copy(io.Discard, b)
			}()
			return a, nil
		}))
	if err := h.Open("w", vsockEndpoint(100, 1)); err != nil {
		t.Fatal(err)
	}
	st, err := h.Dial(within(t), "w")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	frozen.Store(true)
	_, err = st.Read(make([]byte, 1))
	wantFault(t, err, fault.Unavailable, "no sign of life")
}

func TestOpenRefusesEndpoint(t *testing.T) {
	h := newHub(t, link.Options{})
	for _, ep := range []domain.Endpoint{
		{},
		{Kind: domain.LinkSerial},
		{Kind: domain.LinkVsock, CID: 100, Key: []byte("short")},
		{Kind: domain.LinkVsock, Key: make([]byte, 16)},
	} {
		if err := h.Open("w", ep); err == nil {
			t.Errorf("took %+v", ep)
		}
	}
}
