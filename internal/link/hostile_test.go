package link_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/link"
	"github.com/agentiso/agentiso/internal/link/wire"
)

// heapLimit is how much more the host may hold after an attack than before.
const heapLimit = 8 << 20

// peer is the guest's end of a connection; gone is closed with it.
type peer struct {
	net.Conn
	gone chan struct{}
}

// hostile stands at the guest's end of a socket and runs script on every
// connection, until the returned function is called.
func hostile(t testing.TB, sock string, script func(peer)) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				script(peer{c, over})
			})
		}
	})
	stop = sync.OnceFunc(func() {
		l.Close()
		close(over)
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// shake does the guest's part of the handshake, as a good agent would.
func shake(c net.Conn) bool {
	scan := wire.NewScanner(bufio.NewReader(c), -1)
	for {
		f, err := scan.Next()
		if err != nil {
			return false
		}
		switch f.Kind {
		case wire.Hello:
			f.Kind = wire.Welcome
		case wire.Start:
			f.Kind = wire.Started
		default:
			return false
		}
		if _, err := c.Write(f.Append(nil)); err != nil || f.Kind == wire.Started {
			return err == nil
		}
	}
}

func frame(typ uint8, flags uint16, id, length uint32) []byte {
	b := make([]byte, wire.HeaderSize)
	b[1] = typ
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], id)
	binary.BigEndian.PutUint32(b[8:], length)
	return b
}

const ackWindow = wire.MaxWindow - 256<<10 // what yamux grants beyond its initial window

// after shakes hands, waits for the call's first bytes, and sends b over and
// over: n times, or for ever if n is negative. Then it reads until the end.
func after(n int, b ...[]byte) func(peer) {
	all := bytes.Join(b, nil)
	return func(c peer) {
		if !shake(c) {
			return
		}
		if _, err := io.ReadFull(c, make([]byte, wire.HeaderSize)); err != nil {
			return
		}
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { _, _ = io.Copy(io.Discard, c) })
		for left := n; left != 0; left-- {
			if _, err := c.Write(all); err != nil {
				return
			}
		}
	}
}

// speaks serves yamux properly and does with each stream what it wants.
func speaks(script func(net.Conn)) func(peer) {
	return func(c peer) {
		if !shake(c) {
			return
		}
		y, err := yamux.Server(c, wire.GuestConfig())
		if err != nil {
			return
		}
		defer y.Close()
		var wg sync.WaitGroup
		defer wg.Wait()
		defer y.Close()
		for {
			st, err := y.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer st.Close()
				if _, err := http.ReadRequest(bufio.NewReader(st)); err == nil {
					script(st)
				}
			})
		}
	}
}

// says writes text as the whole answer, repeating the last part for ever.
func says(text, forever string) func(peer) {
	return speaks(func(c net.Conn) {
		_, err := io.WriteString(c, text)
		for err == nil && forever != "" {
			_, err = io.WriteString(c, strings.Repeat(forever, 1+4096/len(forever)))
		}
	})
}

func TestHostileGuest(t *testing.T) {
	ack := frame(1, 2, 1, ackWindow)
	half := frame(0, 0, 1, 1000)
	for _, tt := range []struct {
		name   string
		script func(peer)
		kind   fault.Kind
		want   string
	}{
		{"never answers", func(c peer) { _, _ = io.Copy(io.Discard, c) }, fault.Timeout, "did not answer in time"},
		{"reads nothing", func(c peer) { <-c.gone }, fault.Timeout, "did not answer in time"},
		{"hangs up", func(peer) {}, fault.Timeout, "did not answer in time"},
		{"garbage for an answer", func(c peer) { _, _ = io.Copy(c, endless{}) }, fault.Timeout, "too many bytes before the answer"},
		{"wrong nonces for ever", func(c peer) {
			b := wire.Frame{Kind: wire.Welcome, Mode: wire.Mux, Version: wire.Version}.AppendCopies(nil, 1000)
			for {
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		}, fault.Timeout, "too many bytes before the answer"},
		{"another version", func(c peer) {
			f, err := wire.NewScanner(bufio.NewReader(c), -1).Next()
			if err == nil {
				f.Kind, f.Version = wire.Welcome, 9
				_, _ = c.Write(f.Append(nil))
				_, _ = io.Copy(io.Discard, c)
			}
		}, fault.Timeout, "speaks version 9"},
		{"lies about a length", after(1, ack, frame(0, 0, 1, 1<<32-1), make([]byte, 1<<20)), fault.Unavailable, "data frame over"},
		{"ignores the window", after(-1, frame(0, 0, 1, wire.MaxBody), make([]byte, wire.MaxBody)), fault.Unavailable, ""},
		{"overflows the window", after(-1, frame(1, 0, 1, 1<<32-1)), fault.Unavailable, "window over"},
		{"floods pings", after(-1, bytes.Repeat(frame(2, 1, 0, 7), 1000)), fault.Unavailable, "does not ping"},
		{"floods pongs", after(-1, bytes.Repeat(frame(2, 2, 0, 7), 1000)), fault.Unavailable, "answer to no ping"},
		{"floods window updates", after(-1, bytes.Repeat(frame(1, 0, 1, 0), 1000)), fault.Unavailable, "without effect"},
		{"floods small windows", after(-1, bytes.Repeat(frame(1, 0, 1, 1), 1000)), fault.Unavailable, "window over"},
		{"floods late frames", after(-1, frame(1, 8, 1, 0), bytes.Repeat(frame(1, 8, 1, 0), 1000)), fault.Unavailable, ""},
		{"floods streams", after(-1, frame(1, 1, 2, 0), frame(1, 1, 4, 0)), fault.Unavailable, "does not open streams"},
		{"floods garbage", after(-1, bytes.Repeat([]byte{0xff}, 4096)), fault.Unavailable, "where a frame should start"},
		{"goes away", after(1, frame(3, 0, 0, 0)), fault.Unavailable, "ended the session"},
		{"begins anew", after(1, wire.Frame{Kind: wire.Bye, Mode: wire.Mux}.Append(nil)), fault.Unavailable, "was started again"},
		{"stalls mid-header", after(1, ack[:7]), fault.Unavailable, "no sign of life"},
		{"stalls mid-frame", after(1, ack, half, make([]byte, 10)), fault.Unavailable, "no sign of life"},
		{"closes mid-frame", func(c peer) {
			if shake(c) {
				_, _ = io.ReadFull(c, make([]byte, wire.HeaderSize))
				_, _ = c.Write(append(bytes.Clone(half), 1))
			}
		}, fault.Unavailable, "was cut by the machine's side"},
		{"reads nothing more", func(c peer) { shake(c); <-c.gone }, fault.Unavailable, "no sign of life"},
		{"answers no HTTP", says("SSH-2.0-OpenSSH_9.2\r\n", ""), fault.Unavailable, "no valid answer"},
		{"endless header", says("HTTP/1.1 200 OK\r\nX: ", "y"), fault.Unavailable, "headers exceeded 65536 bytes"},
		{"endless headers", says("HTTP/1.1 200 OK\r\n", "A: b\r\n"), fault.Unavailable, "headers exceeded 65536 bytes"},
		{"endless early hints", says("", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"), fault.Unavailable, "no valid answer"},
		{"short body", says("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", ""), "", "unexpected EOF"},
		{"endless chunk header", says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1"), "", "too l"},
		{"endless chunk extension", says("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\nx\r\n"), "", "too much non-data"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before, heap := goleak.IgnoreCurrent(), heapInUse()
			sock := filepath.Join(sockDir(t), "s")
			stop := hostile(t, sock, tt.script)
			h := link.NewHub(link.Options{Stall: 300 * time.Millisecond, Ping: 50 * time.Millisecond})
			open(t, h, "w", sock)

			var err error
			for limit := 100 * time.Millisecond; limit < 20*time.Second; limit *= 2 {
				if tt.kind != fault.Timeout {
					limit = 15 * time.Second
				}
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				err = call(ctx, h)
				cancel()
				if err == nil || strings.Contains(err.Error(), tt.want) {
					break // how long it takes to get there is not the point
				}
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if tt.kind != "" && !fault.Is(err, tt.kind) {
				t.Errorf("got kind %s of %v, want %s", fault.As(err).Kind, err, tt.kind)
			}
			if grown := heapInUse() - heap; grown > heapLimit {
				t.Errorf("holds %d bytes more than before, want at most %d", grown, heapLimit)
			}

			stop()
			g := startGuest(t, sock, agentMux(), false)
			// A call may still meet the end of the session with the old guest.
			eventually(t, "a call to a good guest", func() bool { return ping(t, h) == nil })
			h.Shutdown()
			g.stop()
			goleak.VerifyNone(t, before)
		})
	}
}

// call makes a call and reads all of its answer.
func call(ctx context.Context, h *link.Hub) error {
	resp, err := get(ctx, h.Transport("w"), "/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

func ping(t *testing.T, h *link.Hub) error {
	resp, err := get(within(t), h.Transport("w"), "/health")
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A guest fills what it may while nobody reads: that is all the host holds.
func TestEndlessBodyToSlowReaders(t *testing.T) {
	const calls = 16
	sock := filepath.Join(sockDir(t), "s")
	hostile(t, sock, says("HTTP/1.1 200 OK\r\n\r\n", "endless "))
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	before := heapInUse()
	var bodies []io.Closer
	for range calls {
		resp, err := get(within(t), h.Transport("w"), "/")
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, resp.Body)
	}
	// The windows fill in the background; the heap must stop growing below
	// what buffers that double up to the window can take, on both ends, which
	// share this heap.
	const most = calls*(2*2*wire.MaxWindow) + heapLimit
	var last int64
	for range 200 {
		if last = heapInUse() - before; last > most {
			t.Fatalf("holds %d bytes for %d calls, want at most %d", last, calls, most)
		}
		runtime.Gosched()
	}
	for _, b := range bodies {
		b.Close()
	}
	// What it held for them goes, and other calls were never in the way.
	resp, err := get(within(t), h.Transport("w"), "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// The caller of a stalled guest can leave at once, and so can Close.
func TestStalledGuestHoldsNobody(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	var shaken sync.WaitGroup
	shaken.Add(1)
	hostile(t, sock, func(c peer) {
		if shake(c) {
			shaken.Done()
		}
		<-c.gone // and reads nothing
	})
	h := link.NewHub(link.Options{})
	open(t, h, "w", sock)
	ctx, cancel := context.WithCancel(within(t))
	var wg sync.WaitGroup
	errs := make(chan error, 20)
	for range cap(errs) {
		wg.Go(func() {
			req, _ := http.NewRequestWithContext(ctx, "POST", "http://agent/", endless{})
			resp, err := h.Transport("w").RoundTrip(req)
			if err == nil {
				resp.Body.Close()
			}
			errs <- err
		})
	}
	shaken.Wait()
	cancel()
	wg.Wait() // would take wire.WriteLimit if a caller had to wait for a write
	close(errs)
	for err := range errs {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want canceled", err)
		}
	}
	h.Shutdown()
}

// FuzzGuestBytes feeds a session with a call in progress what a guest might
// send.
func FuzzGuestBytes(f *testing.F) {
	ack := frame(1, 2, 1, ackWindow)
	body := []byte("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
	f.Add(bytes.Join([][]byte{ack, frame(0, 4, 1, uint32(len(body))), body}, nil))
	f.Add(bytes.Join([][]byte{ack, frame(0, 0, 1, 5), []byte("HTTP/")}, nil))
	f.Add(bytes.Join([][]byte{frame(1, 8, 1, 0), frame(0, 0, 1, 5), []byte("xxxxx")}, nil))
	f.Add(frame(2, 2, 0, 0))
	f.Fuzz(func(t *testing.T, in []byte) {
		sock := filepath.Join(sockDir(t), "s")
		first := true
		hostile(t, sock, func(c peer) {
			if !first || !shake(c) {
				return
			}
			first = false
			if _, err := io.ReadFull(c, make([]byte, wire.HeaderSize)); err == nil {
				_, _ = c.Write(in)
			}
		})
		h := newHub(t, link.Options{Stall: time.Second, Ping: 100 * time.Millisecond})
		open(t, h, "w", sock)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := call(ctx, h); errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the call hung: %v", err)
		}
	})
}

// A body that ends because its session did must not look complete even if it
// has no length.
func TestUnframedBodyCutShort(t *testing.T) {
	sock := filepath.Join(sockDir(t), "s")
	cut := make(chan struct{})
	stop := hostile(t, sock, speaks(func(c net.Conn) {
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\nhalf of")
		<-cut
	}))
	h := newHub(t, link.Options{})
	open(t, h, "w", sock)
	resp, err := get(within(t), h.Transport("w"), "/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.ReadFull(resp.Body, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	go stop()
	_, err = resp.Body.Read(make([]byte, 1))
	close(cut)
	wantFault(t, err, fault.Unavailable, "cut by the machine's side")
}
