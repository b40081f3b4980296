package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
)

// pipe is a channel that reads and writes separately.
type pipe struct {
	io.Reader
	io.Writer
}

func (pipe) Close() error { return nil }

func head(typ uint8, flags uint16, id, length uint32) []byte {
	b := make([]byte, HeaderSize)
	b[1] = typ
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], id)
	binary.BigEndian.PutUint32(b[8:], length)
	return b
}

func data(id uint32, n int) []byte {
	return append(head(typeData, 0, id, uint32(n)), make([]byte, n)...)
}

func times(n int, b []byte) []byte { return bytes.Repeat(b, n) }

func seq(bs ...[]byte) []byte { return bytes.Join(bs, nil) }

// hostGuard has sent one ping and opened stream 1, on which it has sent 1000
// bytes and granted the full window.
func hostGuard(t testing.TB, in []byte) *Guard {
	t.Helper()
	g := NewGuard(pipe{bytes.NewReader(in), io.Discard}, HostEnd)
	send(t, g, head(typePing, flagSYN, 0, 42))
	send(t, g, head(typeWindow, flagSYN, 1, MaxWindow-initialWindow))
	send(t, g, head(typeData, 0, 1, 1000))
	send(t, g, make([]byte, 1000))
	return g
}

func send(t testing.TB, g *Guard, b []byte) {
	t.Helper()
	if n, err := g.Write(b); n != len(b) || err != nil {
		t.Fatalf("write: %d, %v", n, err)
	}
}

func TestGuardHoldsGuest(t *testing.T) {
	ack := head(typeWindow, flagACK, 1, MaxWindow-initialWindow)
	for _, tt := range []struct {
		name string
		in   []byte
		want string // in the violation; "" for none
	}{
		{"good answer", seq(head(typePing, flagACK, 0, 42), ack, data(1, MaxBody), head(typeWindow, 0, 1, 1000), head(typeData, flagFIN, 1, 0)), ""},
		{"full window", seq(ack, times(MaxWindow/MaxBody, data(1, MaxBody))), ""},
		{"over the window", seq(ack, times(MaxWindow/MaxBody, data(1, MaxBody)), data(1, 1)), "window exceeded by 1"},
		{"version", []byte{1}, "byte 0x01"},
		{"anew", []byte(magic), ErrAnew.Error()},
		{"type", head(4, 0, 1, 0), "unknown type"},
		{"flags", head(typeData, 16, 1, 0), "unknown flags"},
		{"huge data", head(typeData, 0, 1, 1<<32-1), "data frame over"},
		{"go away", head(typeGoAway, 0, 0, 1), "ended the session, code 1"},
		{"ping", head(typePing, flagSYN, 0, 1), "does not ping"},
		{"answer to no ping", head(typePing, flagACK, 0, 41), "answer to no ping"},
		{"answer twice", times(2, head(typePing, flagACK, 0, 42)), "answer to no ping"},
		{"opens a stream", head(typeWindow, flagSYN, 2, 0), "does not open"},
		{"opens the host's", head(typeData, flagSYN, 1, 0), "does not open"},
		{"never opened", data(3, 1), "no such stream"},
		{"even stream", data(2, 1), "no such stream"},
		{"stream 0", data(0, 1), "no such stream"},
		{"empty data", head(typeData, 0, 1, 0), "without effect"},
		{"empty window update", head(typeWindow, 0, 1, 0), "without effect"},
		{"ACK twice", seq(ack, ack), "unexpected ACK"},
		{"FIN twice", times(2, head(typeWindow, flagFIN, 1, 0)), "second FIN"},
		{"data after FIN", seq(head(typeData, flagFIN, 1, 0), data(1, 1)), "data after FIN"},
		{"window overflow", head(typeWindow, 0, 1, 1<<32-1), "window over"},
		{"window for nothing", seq(ack, head(typeWindow, 0, 1, 1001)), "window over"},
		{"frames after RST", seq(head(typeWindow, flagRST, 1, 0), times(lateFrames+1, head(typeWindow, 0, 1, 1))), "stream has ended"},
		{"data after RST", seq(head(typeWindow, flagRST, 1, 0), times(MaxWindow/MaxBody+1, data(1, MaxBody))), "stream has ended"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, chunk := range []int{1 << 20, 5} {
				g := hostGuard(t, tt.in)
				got := drain(g, chunk)
				switch {
				case tt.want == "" && (!errors.Is(g.Err(), io.EOF) || got != len(tt.in)):
					t.Errorf("%d of %d bytes, then %v", got, len(tt.in), g.Err())
				case tt.want != "" && !strings.Contains(g.Err().Error(), tt.want):
					t.Errorf("got %v, want %q", g.Err(), tt.want)
				}
			}
		})
	}
}

// drain reads all that g lets through, in reads of at most chunk bytes.
func drain(g *Guard, chunk int) int {
	b := make([]byte, chunk)
	total := 0
	for {
		n, err := g.Read(b)
		total += n
		if err != nil {
			return total
		}
	}
}

// What is on its way when the host resets a stream may come all the same, but
// not more than that.
func TestGuardLateFrames(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   []byte
		want string
	}{
		{"in flight", seq(times(MaxWindow/MaxBody, data(1, MaxBody)), head(typeWindow, flagFIN, 1, 0)), ""},
		{"more", times(MaxWindow/MaxBody+1, data(1, MaxBody)), "stream has ended"},
	} {
		g := hostGuard(t, tt.in)
		if err := g.Reset(1); err != nil {
			t.Fatal(err)
		}
		drain(g, 1<<16)
		if err := g.Err(); tt.want == "" && !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// A guest that ends stream after stream must not save up rights without end.
func TestGuardLateFramesCapped(t *testing.T) {
	g := NewGuard(pipe{bytes.NewReader(nil), io.Discard}, HostEnd)
	for id := uint32(1); id < 200_000; id += 2 {
		send(t, g, head(typeWindow, flagSYN, id, MaxWindow-initialWindow))
		if err := g.Reset(id); err != nil {
			t.Fatal(err)
		}
	}
	if len(g.flows) != 0 || g.lateBytes > maxLateBytes || g.lateFrames > maxLateFrames {
		t.Errorf("keeps %d flows, %d late bytes, %d late frames", len(g.flows), g.lateBytes, g.lateFrames)
	}
}

func TestGuardSends(t *testing.T) {
	var out bytes.Buffer
	g := NewGuard(pipe{bytes.NewReader(nil), &out}, HostEnd)
	want := func(what string, b []byte) {
		t.Helper()
		if !bytes.Equal(out.Bytes(), b) {
			t.Errorf("%s: sent %x, want %x", what, out.Bytes(), b)
		}
		out.Reset()
	}
	syn := head(typeWindow, flagSYN, 1, 0)
	send(t, g, syn)
	want("open", syn)
	send(t, g, head(typeData, 0, 1, 2))
	want("a header alone", nil)
	send(t, g, []byte("hi"))
	want("with its body", append(head(typeData, 0, 1, 2), "hi"...))
	if err := g.CloseWrite(1); err != nil {
		t.Fatal(err)
	}
	want("half-close", head(typeWindow, flagFIN, 1, 0))
	send(t, g, head(typeWindow, flagFIN, 1, 0))
	want("yamux's own FIN later", nil)
	for range 2 {
		if err := g.Reset(1); err != nil {
			t.Fatal(err)
		}
	}
	want("reset, once", head(typeWindow, flagRST, 1, 0))
	send(t, g, head(typeData, 0, 1, 2))
	send(t, g, []byte("hi"))
	send(t, g, head(typeWindow, flagRST, 1, 0))
	want("after it", nil)
}

// The guest's guard knows another peer: one that opens streams and pings.
func TestGuardHoldsHost(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   []byte
		want string
	}{
		{"in any order", seq(head(typeWindow, flagSYN, 3, 0), head(typeWindow, flagSYN, 1, 0), data(1, 10), head(typePing, flagSYN, 0, 1)), ""},
		{"even", head(typeWindow, flagSYN, 2, 0), "unexpected SYN"},
		{"twice", times(2, head(typeWindow, flagSYN, 1, 0)), "unexpected SYN"},
		{"too many", many(2*MaxStreams + 1), "unexpected SYN"},
		{"ACK", seq(head(typeWindow, flagSYN, 1, 0), head(typeWindow, flagACK, 1, 0)), "unexpected ACK"},
		{"pong", head(typePing, flagACK, 0, 1), "answer to no ping"},
	} {
		g := NewGuard(pipe{bytes.NewReader(tt.in), io.Discard}, GuestEnd)
		drain(g, 1<<16)
		if err := g.Err(); tt.want == "" && !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func many(n int) []byte {
	var b []byte
	for i := range n {
		b = append(b, head(typeWindow, flagSYN, uint32(2*i+1), 0)...)
	}
	return b
}

func TestGuardLeftover(t *testing.T) {
	hello := Frame{Kind: Hello, Mode: Mux}.Append(nil)
	g := NewGuard(pipe{bytes.NewReader(seq(head(typeWindow, flagSYN, 1, 0), hello)), io.Discard}, GuestEnd)
	if n := drain(g, 1<<16); n != HeaderSize || !errors.Is(g.Err(), ErrAnew) || !bytes.Equal(g.Leftover(), hello) {
		t.Errorf("let %d bytes through, then %v and %q", n, g.Err(), g.Leftover())
	}
}

// FuzzGuard checks against a second, plain reading of what was let through
// that yamux never sees what it must not.
func FuzzGuard(f *testing.F) {
	ack := head(typeWindow, flagACK, 1, 0)
	for _, host := range []bool{true, false} {
		f.Add(host, uint8(7), seq(ack, data(1, 300), head(typePing, flagACK, 0, 42)))
		f.Add(host, uint8(255), seq(ack, times(9, data(1, MaxBody))))
		f.Add(host, uint8(1), seq(head(typeWindow, flagSYN, 1, 5), head(typeData, flagRST, 1, 0), data(1, 3)))
		f.Add(host, uint8(12), head(typeData, 0, 1, 1<<31))
	}
	f.Fuzz(func(t *testing.T, host bool, chunk uint8, in []byte) {
		g := NewGuard(pipe{bytes.NewReader(in), io.Discard}, GuestEnd)
		if host {
			g = hostGuard(t, in)
		}
		n := drain(g, int(chunk)+1)
		if n > len(in) {
			t.Fatalf("let %d of %d bytes through", n, len(in))
		}
		if len(g.flows) > 2*MaxStreams {
			t.Errorf("%d streams", len(g.flows))
		}
		got := map[uint32]int64{}
		pings := 0
		for b := in[:n]; len(b) >= HeaderSize; {
			h := parseHeader(b)
			b = b[HeaderSize:]
			switch {
			case in[0] != 0 || h.typ > typePing || h.flags > 15:
				t.Fatalf("let through %v", h)
			case host && h.flags&flagSYN != 0:
				t.Fatalf("let a guest open or ping: %v", h)
			case h.typ == typePing:
				if pings++; host && pings > 1 {
					t.Fatal("let a second answer through")
				}
			case h.typ == typeData:
				if got[h.id] += int64(h.length); h.length > MaxBody || host && got[h.id] > MaxWindow {
					t.Fatalf("let through %v after %d bytes", h, got[h.id])
				}
				b = b[min(len(b), int(h.length)):]
			}
		}
	})
}
