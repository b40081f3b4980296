package link_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/guest/port"
	"github.com/agentiso/agentiso/internal/guest/port/porttest"
	"github.com/agentiso/agentiso/internal/link"
	"github.com/agentiso/agentiso/internal/link/wire"
)

// asInit, if set, runs the tests of a binary that was booted as PID 1.
var asInit func(m *testing.M)

func TestMain(m *testing.M) {
	if asInit != nil && os.Getpid() == 1 {
		asInit(m)
	}
	goleak.VerifyTestMain(m)
}

// sockDir returns a directory with a path short enough for a Unix socket.
func sockDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "link")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// within bounds what a test waits for; reaching it is a failure.
func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls until ok, or fails the test.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx := within(t)
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not in time: %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

// guest is a good agent on an imitated port.
type guest struct {
	port *porttest.Port
	serv *http.Server
	done chan struct{}
	once sync.Once
}

func startGuest(t testing.TB, sock string, h http.Handler, unseen bool) *guest {
	t.Helper()
	p, err := porttest.Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	p.Unseen = unseen
	g := &guest{port: p, serv: &http.Server{Handler: h}, done: make(chan struct{})}
	l := port.NewSerial(p, port.Options{})
	go func() {
		defer close(g.done)
		if err := g.serv.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, os.ErrClosed) {
			t.Errorf("guest: %v", err)
		}
	}()
	t.Cleanup(g.stop)
	return g
}

// stop is the machine's end.
func (g *guest) stop() {
	g.once.Do(func() {
		g.port.Close()
		g.serv.Close()
		<-g.done
	})
}

// agentMux is what the tests' agents serve.
func agentMux() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, n)
	})
	mux.HandleFunc("/download", func(w http.ResponseWriter, r *http.Request) {
		var n int64
		fmt.Sscan(r.URL.Query().Get("n"), &n)
		_, _ = io.CopyN(w, endless{}, n)
	})
	mux.HandleFunc("/hang", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("/tcp", func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
		b, _ := io.ReadAll(rw)
		fmt.Fprintf(c, "got %d", len(b))
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
	})
	return mux
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(i)
	}
	return len(p), nil
}

func get(ctx context.Context, rt http.RoundTripper, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://agent"+path, nil)
	if err != nil {
		return nil, err
	}
	return rt.RoundTrip(req)
}

// healthy makes one call that must succeed.
func healthy(t testing.TB, h *link.Hub, id string) {
	t.Helper()
	resp, err := get(within(t), h.Transport(id), "/health")
	if err != nil {
		t.Fatalf("call a good agent: %v", err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		t.Fatalf("status %d, want 204", resp.StatusCode)
	}
}

func serial(sock string) domain.Endpoint {
	return domain.Endpoint{Kind: domain.LinkSerial, Socket: sock}
}

func newHub(t testing.TB, opts link.Options) *link.Hub {
	t.Helper()
	h := link.NewHub(opts)
	t.Cleanup(h.Shutdown)
	return h
}

func open(t testing.TB, h *link.Hub, id, sock string) {
	t.Helper()
	if err := h.Open(id, serial(sock)); err != nil {
		t.Fatal(err)
	}
}

func wantFault(t testing.TB, err error, kind fault.Kind, text string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %s %q", kind, text)
	}
	f := fault.As(err)
	if f.Kind != kind || !strings.Contains(f.Msg, text) {
		t.Fatalf("got %s %q, want %s %q", f.Kind, f.Msg, kind, text)
	}
	if kind == fault.Unavailable && f.Next == "" {
		t.Errorf("%q names no next step", f.Msg)
	}
}

func TestCalls(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	startGuest(t, sock, agentMux(), false)
	ctx := within(t)

	t.Run("download", func(t *testing.T) {
		const n = 9<<20 + 7
		resp, err := get(ctx, h.Transport("w"), fmt.Sprintf("/download?n=%d", n))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if got, err := io.Copy(io.Discard, resp.Body); got != n || err != nil {
			t.Fatalf("read %d bytes, %v; want %d", got, err, n)
		}
	})
	t.Run("upload", func(t *testing.T) {
		const n = 9<<20 + 7
		req, _ := http.NewRequestWithContext(ctx, "POST", "http://agent/upload", io.LimitReader(endless{}, n))
		resp, err := h.Transport("w").RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); string(b) != fmt.Sprint(n) || err != nil {
			t.Fatalf("agent counted %q, %v; want %d", b, err, n)
		}
	})
	t.Run("upgrade with half-close", func(t *testing.T) {
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://agent/tcp", nil)
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "tcp")
		resp, err := h.Transport("w").RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		rwc := resp.Body.(io.ReadWriteCloser)
		defer rwc.Close()
		if _, err := rwc.Write(bytes.Repeat([]byte("x"), 300_000)); err != nil {
			t.Fatal(err)
		}
		if err := rwc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(rwc); string(b) != "got 300000" || err != nil {
			t.Fatalf("read %q, %v", b, err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				resp, err := get(ctx, h.Transport("w"), "/download?n=100000")
				if err != nil {
					t.Error(err)
					return
				}
				defer resp.Body.Close()
				if n, err := io.Copy(io.Discard, resp.Body); n != 100000 || err != nil {
					t.Errorf("read %d, %v", n, err)
				}
			})
		}
		wg.Wait()
	})
	t.Run("limit", func(t *testing.T) {
		var open []net.Conn
		defer func() {
			for _, c := range open {
				c.Close()
			}
		}()
		for range wire.MaxStreams {
			c, err := h.Dial(ctx, "w")
			if err != nil {
				// Streams of the calls above may still be on their way out.
				if fault.Is(err, fault.Limit) {
					break
				}
				t.Fatal(err)
			}
			open = append(open, c)
		}
		_, err := get(ctx, h.Transport("w"), "/health")
		wantFault(t, err, fault.Limit, "256 calls in progress")
	})
	eventually(t, "a call after the limit", func() bool {
		resp, err := get(ctx, h.Transport("w"), "/health")
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
	for _, mode := range []wire.Mode{wire.Sink, wire.Source, wire.Echo} {
		t.Run("raw "+string(mode), func(t *testing.T) {
			n := int64(3 << 20)
			if mode == wire.Echo {
				n = 100
			}
			if _, err := h.Raw(ctx, "w", mode, n); err != nil {
				t.Fatal(err)
			}
			healthy(t, h, "w")
		})
	}
}

// Every way in which a call can lose its machine has to end it, and say why.
func TestPendingCallEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(h *link.Hub, g *guest)
		want string
	}{
		{"close", func(h *link.Hub, g *guest) { h.Close("w") }, "was closed"},
		{"machine dies", func(h *link.Hub, g *guest) { g.stop() }, "cut by the machine's side"},
		{"suspend", func(h *link.Hub, g *guest) {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if err := h.Suspend(ctx, "w"); err != nil {
				panic(err)
			}
		}, "being captured"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sock := filepath.Join(sockDir(t), "s")
			g := startGuest(t, sock, agentMux(), false)
			h := newHub(t, link.Options{})
			open(t, h, "w", sock)
			resp, err := get(within(t), h.Transport("w"), "/hang")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			conn, err := h.Dial(within(t), "w")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			tt.end(h, g)
			_, err = io.ReadAll(resp.Body)
			wantFault(t, err, fault.Unavailable, tt.want)
			_, err = conn.Read(make([]byte, 1)) // no framing: must not look like an end
			wantFault(t, err, fault.Unavailable, tt.want)
		})
	}
}

func TestMachineGone(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	g := startGuest(t, sock, agentMux(), false)
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	healthy(t, h, "w")
	g.stop()
	eventually(t, "the end of the session", func() bool {
		_, err := get(context.Background(), h.Transport("w"), "/health")
		return err != nil && strings.Contains(err.Error(), "machine of workspace w is gone")
	})
	_, err := get(context.Background(), h.Transport("other"), "/health")
	wantFault(t, err, fault.Unavailable, "workspace other has no link")
}

func TestFirstCallWaitsForAgent(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	// The machine's socket is there, the agent is not: QEMU accepts and reads
	// nothing.
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = get(ctx, h.Transport("w"), "/health")
	wantFault(t, err, fault.Timeout, "workspace w did not answer in time")
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is not DeadlineExceeded", err)
	}
	l.Close()
	startGuest(t, sock, agentMux(), false)
	healthy(t, h, "w")
}

func TestSuspendHoldsCalls(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	startGuest(t, sock, agentMux(), false)
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	healthy(t, h, "w")
	if err := h.Suspend(within(t), "w"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := get(ctx, h.Transport("w"), "/health")
	wantFault(t, err, fault.Timeout, "being captured")
	done := make(chan error, 1)
	go func() {
		resp, err := get(context.Background(), h.Transport("w"), "/health")
		if err == nil {
			resp.Body.Close()
		}
		done <- err
	}()
	h.Resume("w")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A hundred hosts come and go in the middle of transfers; each must find the
// agent, also when the guest has not seen the last one leave.
func TestReconnectUnderTraffic(t *testing.T) {
	for _, unseen := range []bool{false, true} {
		t.Run(fmt.Sprintf("unseen=%v", unseen), func(t *testing.T) {
			sock := filepath.Join(sockDir(t), "s")
			startGuest(t, sock, agentMux(), unseen)
			for i := range 50 {
				h := link.NewHub(link.Options{})
				open(t, h, "w", sock)
				down, err := get(within(t), h.Transport("w"), "/download?n=100000000")
				if err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				wg.Go(func() { _, _ = io.Copy(io.Discard, down.Body) })
				wg.Go(func() {
					req, _ := http.NewRequestWithContext(within(t), "POST", "http://agent/upload", endless{})
					if resp, err := h.Transport("w").RoundTrip(req); err == nil {
						resp.Body.Close()
					}
				})
				if i%2 == 0 {
					healthy(t, h, "w")
				}
				h.Shutdown()
				down.Body.Close()
				wg.Wait()
			}
			h := newHub(t, link.Options{})
			open(t, h, "w", sock)
			healthy(t, h, "w")
		})
	}
}
