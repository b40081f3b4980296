package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2"}, "capabilities": ["oob"]}}` + "\n"

// peer is QEMU's end, played by a test.
type peer struct {
	t    *testing.T
	conn *net.UnixConn
	r    *bufio.Reader
}

// command is a line that the client sent.
type command struct {
	Execute   string
	Arguments map[string]any
	ID        uint64
}

func (p *peer) send(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.conn, format, args...); err != nil {
		p.t.Errorf("peer: %v", err)
	}
}

func (p *peer) recv() command {
	p.t.Helper()
	line, err := p.r.ReadBytes('\n')
	if err != nil {
		p.t.Errorf("peer: %v", err)
		return command{}
	}
	var c command
	if err := json.Unmarshal(line, &c); err != nil {
		p.t.Errorf("peer: %q: %v", line, err)
	}
	return c
}

func (p *peer) ok(c command) { p.send(`{"return": {}, "id": %d}`+"\r\n", c.ID) }

func pair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// open runs script as the peer of a negotiated client. The script's end closes
// its side.
func open(t *testing.T, opts Options, script func(p *peer)) *Client {
	t.Helper()
	ours, theirs := pair(t)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer theirs.Close()
		p := &peer{t, theirs, bufio.NewReader(theirs)}
		p.send(greeting)
		p.ok(p.recv())
		script(p)
	}()
	c, err := New(t.Context(), ours, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); <-ended })
	return c
}

func TestGreetingAndCommand(t *testing.T) {
	c := open(t, Options{}, func(p *peer) {
		cmd := p.recv()
		if diff := cmp.Diff(command{"device_add", map[string]any{"id": "x,y"}, 2}, cmd); diff != "" {
			p.t.Errorf("command (-want +got):\n%s", diff)
		}
		p.send(`{"return": {"n": 7}, "id": %d}`+"\n", cmd.ID)
		cmd = p.recv()
		p.send(`{"error": {"class": "DeviceNotFound", "desc": "no\u001b[31m such\u0007"}, "id": %d}`+"\n", cmd.ID)
	})
	if diff := cmp.Diff(Version{7, 2, 22, "Debian 1:7.2"}, c.Version()); diff != "" {
		t.Errorf("version (-want +got):\n%s", diff)
	}
	var got struct{ N int }
	if err := c.Do(t.Context(), "device_add", map[string]string{"id": "x,y"}, &got); err != nil || got.N != 7 {
		t.Errorf("got %v, %v", got, err)
	}
	err := c.Do(t.Context(), "device_del", nil, nil)
	want := &Error{"device_del", "DeviceNotFound", "no�[31m such�"}
	if e, ok := errors.AsType[*Error](err); !ok || cmp.Diff(want, e) != "" {
		t.Errorf("got %#v, want %#v", err, want)
	}
}

func TestAnswersOutOfOrder(t *testing.T) {
	c := open(t, Options{}, func(p *peer) {
		a, b := p.recv(), p.recv()
		for _, cmd := range []command{b, a} {
			p.send(`{"event": "BETWEEN", "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n")
			p.send(`{"return": %q, "id": %d}`+"\n", cmd.Execute, cmd.ID)
		}
	})
	errs := make(chan error, 2)
	for _, name := range []string{"first", "second"} {
		go func() {
			var got string
			err := c.Do(t.Context(), name, nil, &got)
			if err == nil && got != name {
				err = fmt.Errorf("%s was answered %s", name, got)
			}
			errs <- err
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestEvents(t *testing.T) {
	subscribed := make(chan struct{})
	c := open(t, Options{}, func(p *peer) {
		<-subscribed
		p.send(`{"event": "STOP", "timestamp": {"seconds": 5, "microseconds": 6}}` + "\n")
		for range 100 {
			p.send(`{"event": "NOISE", "data": {}}` + "\n")
		}
		p.send(`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}` + "\n")
	})
	all := c.Subscribe(3)
	last := c.Subscribe(1, "SHUTDOWN")
	gone := c.Subscribe(1)
	gone.Close()
	gone.Close()
	close(subscribed)
	<-c.Done()
	if err := c.Err(); !errors.Is(err, io.EOF) {
		t.Errorf("ended with %v, want EOF", err)
	}
	var names []string
	for e := range all.Events() {
		names = append(names, e.Name)
		if e.Name == "STOP" && !e.Time.Equal(time.Unix(5, 6000)) {
			t.Errorf("time %v", e.Time)
		}
	}
	if diff := cmp.Diff([]string{"STOP", "NOISE", "NOISE"}, names); diff != "" {
		t.Errorf("kept (-want +got):\n%s", diff)
	}
	if all.Lost() != 99 {
		t.Errorf("lost %d, want 99", all.Lost())
	}
	if e := <-last.Events(); string(e.Data) != `{"guest": true, "reason": "guest-reset"}` {
		t.Errorf("event %+v", e)
	}
	if _, open := <-gone.Events(); open {
		t.Error("closed subscription got an event")
	}
	if _, open := <-c.Subscribe(1).Events(); open {
		t.Error("subscription to a dead connection is open")
	}
}

func TestBytesInPieces(t *testing.T) {
	c := open(t, Options{}, func(p *peer) {
		cmd := p.recv()
		for _, b := range fmt.Appendf(nil, "{\"return\": \"é\", \"id\": %d}\r\n", cmd.ID) {
			p.send("%s", string([]byte{b}))
		}
	})
	var got string
	if err := c.Do(t.Context(), "query", nil, &got); err != nil || got != "é" {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestLongCommand needs several writes: the peer starts reading late.
func TestLongCommand(t *testing.T) {
	arg := strings.Repeat("x", 4<<20)
	c := open(t, Options{}, func(p *peer) {
		cmd := p.recv()
		if cmd.Arguments["a"] != arg {
			p.t.Error("argument did not arrive whole")
		}
		p.ok(cmd)
	})
	if err := c.Do(t.Context(), "long", map[string]string{"a": arg}, nil); err != nil {
		t.Error(err)
	}
}

func TestBrokenPeers(t *testing.T) {
	tests := []struct {
		name string
		say  string
		want string
	}{
		{"garbage", "\x00\xff\x1b[2J\n", "not JSON"},
		{"a terminal's greeting", "QEMU 7.2.22 monitor\n", "not JSON"},
		{"truncated", `{"return": `, "not JSON"},
		{"an array", "[]\n", "not JSON"},
		{"nothing known", "{}\n", "not exactly one"},
		{"two sorts", `{"return": {}, "event": "X", "id": 2}` + "\n", "not exactly one"},
		{"second greeting", greeting, "second greeting"},
		{"no id", `{"return": {}}` + "\n", "without an id"},
		{"refused line", `{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n", "peer: JSON parse error"},
		{"future id", `{"return": {}, "id": 99}` + "\n", "not sent"},
		{"negative id", `{"return": {}, "id": -1}` + "\n", "not JSON"},
		{"deep", strings.Repeat("[", 20000) + "\n", "not JSON"},
		{"long line", `{"return": "` + strings.Repeat("x", 70000), "longer than 65536"},
		{"death", "", "EOF"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := open(t, Options{MaxLine: 64 << 10}, func(p *peer) {
				p.recv()
				_, _ = p.conn.Write([]byte(tt.say)) // the client may hang up halfway
			})
			err := c.Do(t.Context(), "query", nil, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			<-c.Done()
			if again := c.Do(t.Context(), "query", nil, nil); !errors.Is(again, c.Err()) {
				t.Errorf("second command: got %v, want %v", again, c.Err())
			}
		})
	}
}

func TestBadGreeting(t *testing.T) {
	tests := []struct{ name, say, want string }{
		{"event first", `{"event": "X"}` + "\n", "no greeting"},
		{"closed", "", "EOF"},
		{"garbage", "SSH-2.0\n", "not JSON"},
		{"answer to nothing", greeting + `{"return": {}, "id": 7}` + "\n", "not sent"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ours, theirs := pair(t)
			_, _ = theirs.Write([]byte(tt.say))
			if err := theirs.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			_, err := New(t.Context(), ours, Options{})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestSilentPeer(t *testing.T) {
	ours, _ := pair(t)
	if _, err := New(t.Context(), ours, Options{Timeout: time.Millisecond}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a timeout", err)
	}
}

// TestTimeout: a command that is not answered in time is forgotten, and the
// connection serves the next; its late answer harms nobody.
func TestTimeout(t *testing.T) {
	c := open(t, Options{}, func(p *peer) {
		var got []command
		for len(got) == 0 || got[len(got)-1].Execute == "slow" {
			got = append(got, p.recv())
		}
		for _, cmd := range got {
			p.ok(cmd)
		}
		_, _ = p.r.ReadByte()
	})
	c.opts.Timeout = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Do(ctx, "unsent", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want canceled", err)
	}
	if err := c.Do(t.Context(), "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a timeout", err)
	}
	c.opts.Timeout = DefaultTimeout
	if err := c.Do(t.Context(), "next", nil, nil); err != nil {
		t.Error(err)
	}
}

// TestStuckWriter: a peer that reads nothing cannot hold a command beyond its
// time, and half a command ends the connection.
func TestStuckWriter(t *testing.T) {
	release := make(chan struct{})
	c := open(t, Options{}, func(*peer) { <-release })
	c.opts.Timeout = 50 * time.Millisecond
	defer close(release)
	for c.Err() == nil { // on a busy host the time may be over before the first byte
		err := c.Do(t.Context(), "long", map[string]string{"a": strings.Repeat("x", 1<<20)}, nil)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, want a timeout", err)
		}
	}
	<-c.Done()
	if err := c.Err(); err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("connection ended with %v", err)
	}
}

func TestCloseEndsWaiters(t *testing.T) {
	arrived := make(chan struct{})
	c := open(t, Options{}, func(p *peer) {
		p.recv()
		close(arrived)
		_, _ = p.r.ReadByte()
	})
	errs := make(chan error, 1)
	go func() { errs <- c.Do(t.Context(), "wait", nil, nil) }()
	<-arrived
	c.Close()
	if err := <-errs; !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want %v", err, ErrClosed)
	}
}

func TestPassFile(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	c := open(t, Options{}, func(p *peer) {
		b, oob := make([]byte, 4096), make([]byte, 4096)
		n, oobn, _, _, err := p.conn.ReadMsgUnix(b, oob)
		if err != nil {
			p.t.Error(err)
			return
		}
		msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			p.t.Errorf("control messages %v, %v", msgs, err)
			return
		}
		fds, err := syscall.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			p.t.Errorf("files %v, %v", fds, err)
			return
		}
		theirs := os.NewFile(uintptr(fds[0]), "passed")
		defer theirs.Close()
		text := make([]byte, 7)
		_, _ = theirs.ReadAt(text, 0)
		got <- string(text)
		var cmd command
		_ = json.Unmarshal(b[:n], &cmd)
		p.ok(cmd)
		_, _ = p.r.ReadByte() // until the client closes
	})
	if err := c.DoFiles(t.Context(), "getfd", map[string]string{"fdname": "f"}, nil, f); err != nil {
		t.Fatal(err)
	}
	if text := <-got; text != "through" {
		t.Errorf("peer read %q", text)
	}
	closed, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if err := c.DoFiles(t.Context(), "getfd", nil, nil, closed); err == nil || c.Err() != nil {
		t.Errorf("a closed file: got %v, and the connection ended with %v", err, c.Err())
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		greeting, `{"event":"X","data":{"a":[1,2]},"timestamp":{"seconds":1,"microseconds":2}}`,
		`{"return":{},"id":1}`, `{"error":{"class":"C","desc":"D"},"id":1}`, `{"return":null,"id":18446744073709551615}`,
		`{"QMP":{"version":{"qemu":{"major":1e99}}}}`, "{}", "null", "\r", "\x00", `{"ID":1,"RETURN":1}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parse(line)
		if err != nil {
			if _, ok := errors.AsType[*ProtocolError](err); !ok {
				t.Errorf("error is %T", err)
			}
			return
		}
		if (m.Return != nil || m.Error != nil) && m.ID == nil {
			t.Error("an answer to nobody")
		}
		var result any
		_ = m.decode("fuzz", &result)
	})
}
