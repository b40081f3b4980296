package server_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/api/process/processconnect"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/server/servertest"
)

func processes(t *testing.T, d *servertest.Daemon, ref string, h2 bool) processconnect.ProcessClient {
	t.Helper()
	return processconnect.NewProcessClient(httpClient(t, d, h2), "http://agentiso/workspaces/"+ref+"/agent")
}

func startReq(cmd string, args ...string) *connect.Request[process.StartRequest] {
	return connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: cmd, Args: args}})
}

func TestProxyPassesStreamsOn(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		d := servertest.Start(t, nil)
		id := create(t, d, "a")
		stream, err := processes(t, d, "a", h2).Start(t.Context(), startReq("echo", "hello"))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for stream.Receive() {
			got = append(got, fmt.Sprint(stream.Msg().GetEvent().GetEvent()))
		}
		if err := stream.Err(); err != nil || len(got) != 3 {
			t.Errorf("h2=%v: events %v, %v", h2, got, err)
		}
		if h := stream.ResponseHeader().Get("Agentiso-Workspace"); h != id {
			t.Errorf("the answer is of %q, not %q", h, id)
		}
		_ = stream.Close()
	}
}

func TestProxyPassesAgentErrorsOn(t *testing.T) {
	d := servertest.Start(t, nil)
	create(t, d, "a")
	_, err := processes(t, d, "a", false).CloseStdin(t.Context(), connect.NewRequest(&process.CloseStdinRequest{
		Process: &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: 1}},
	}))
	if connect.CodeOf(err) != connect.CodeNotFound || info(err) != nil {
		t.Errorf("error is %v with %v", err, info(err))
	}
	// The daemon's own say more.
	if _, err := d.Workspaces.Stop(t.Context(), "a", false); err != nil {
		t.Fatal(err)
	}
	stream, err := processes(t, d, "a", false).Start(t.Context(), startReq("echo"))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if stream.Receive() || info(stream.Err()).GetKind() != string(fault.WrongState) {
		t.Errorf("the call to a stopped workspace ended with %v", stream.Err())
	}
}

// A stream whose machine dies, or whose daemon ends, ends with an error and
// not with a bare end of file.
func TestStreamsEndWithAReason(t *testing.T) {
	for name, kill := range map[string]func(*testing.T, *servertest.Daemon){
		"machine": func(_ *testing.T, d *servertest.Daemon) { d.Workspaces.Crash("a") },
		"daemon":  func(t *testing.T, d *servertest.Daemon) { d.Stop(t) },
	} {
		for _, h2 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/h2=%v", name, h2), func(t *testing.T) {
				d := servertest.Start(t, nil)
				create(t, d, "a")
				stream, err := processes(t, d, "a", h2).Start(t.Context(), startReq("sleep"))
				if err != nil {
					t.Fatal(err)
				}
				defer stream.Close()
				if !stream.Receive() {
					t.Fatal(stream.Err())
				}
				kill(t, d)
				if stream.Receive() {
					t.Fatal("the stream goes on")
				}
				if err := stream.Err(); connect.CodeOf(err) != connect.CodeUnavailable || info(err).GetKind() != string(fault.Unavailable) {
					t.Errorf("the stream ended with %v", err)
				}
			})
		}
	}
}

// rawAgent answers every request with bytes, and closes.
type rawAgent struct{ answer string }

func (a rawAgent) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	_, _ = io.WriteString(conn, a.answer)
	_ = conn.Close()
}

func TestHostileAnswers(t *testing.T) {
	huge := make([]byte, 5)
	binary.BigEndian.PutUint32(huge[1:], 1<<31)
	stream := "HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nConnection: close\r\n\r\n"
	for name, answer := range map[string]string{
		"nothing":              "",
		"no HTTP":              "\x00\xff\x1b[2J nonsense\r\n\r\n",
		"headers without end":  "HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: "+strings.Repeat("a", 1000)+"\r\n", 20_000),
		"informational flood":  strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", 200_000),
		"switches protocols":   "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
		"cut in a frame":       stream + "\x00\x00\x00\x00\x10abc",
		"no last frame":        stream,
		"a frame of 2 GiB":     stream + string(huge) + "abc",
		"a lie about length":   "HTTP/1.1 200 OK\r\nContent-Type: application/connect+proto\r\nContent-Length: 99999\r\n\r\n",
		"nonsense after end":   stream + "\x02\x00\x00\x00\x02{}" + strings.Repeat("x", 1<<20),
		"an error with colour": stream + "\x02\x00\x00\x00\x3e" + `{"error":{"code":"not_found","message":"\u001b[31mred\u001b[0m"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			d := servertest.Start(t, func() http.Handler { return rawAgent{answer} })
			create(t, d, "a")
			s, err := processes(t, d, "a", false).Start(t.Context(), startReq("x"))
			if err != nil {
				t.Fatal(err)
			}
			for s.Receive() {
			}
			err = s.Err()
			_ = s.Close()
			t.Log(err)
			if err == nil && name != "nonsense after end" {
				t.Error("no error")
			}
			if err := errors.Unwrap(err); err != nil && strings.Contains(err.Error(), "\x1b") && name != "an error with colour" {
				t.Errorf("control characters in the daemon's own words: %q", err)
			}
			if _, err := d.Workspaces.Get(t.Context(), "a"); err != nil {
				t.Error(err)
			}
		})
	}
}

// While nobody reads, the agent must not be able to send without end.
func TestProxyBackPressure(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2=%v", h2), func(t *testing.T) {
			agent := servertest.NewAgent()
			d := servertest.Start(t, func() http.Handler { return agent })
			create(t, d, "a")
			ctx, cancel := context.WithCancel(t.Context())
			stream, err := processes(t, d, "a", h2).Start(ctx, startReq("yes"))
			if err != nil {
				t.Fatal(err)
			}
			defer stream.Close()
			defer cancel()
			for range 3 {
				if !stream.Receive() {
					t.Fatal(stream.Err())
				}
			}
			// It has stalled when it sends nothing over many polls.
			var last int64
			still := 0
			eventually(t, "the agent stalls", func() bool {
				if n := agent.Printed.Load(); n != last {
					last, still = n, 0
				} else {
					still++
				}
				return still > 40
			})
			const generous = 16 << 20 // windows and socket buffers of both hops
			if last > generous {
				t.Errorf("%d bytes were taken off the agent with nobody reading", last)
			}
			before := last
			for range 200 {
				if !stream.Receive() {
					t.Fatal(stream.Err())
				}
			}
			eventually(t, "the agent goes on", func() bool { return agent.Printed.Load() > before })
		})
	}
}

// An agent that answers before it has read the input must not leave the
// caller waiting for its own body.
func TestEarlyAnswerToAnOpenInput(t *testing.T) {
	d := servertest.Start(t, func() http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).EnableFullDuplex()
			w.WriteHeader(http.StatusTeapot)
		})
	})
	create(t, d, "a")
	body, w := io.Pipe()
	defer w.Close()
	res, err := httpClient(t, d, false).Post("http://agentiso/workspaces/a/agent/files?path=/x", "application/octet-stream", body)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusTeapot {
		t.Error(res.Status)
	}
}

func tunnel(t *testing.T, d *servertest.Daemon, port string) (net.Conn, *bufio.Reader, *http.Response) {
	t.Helper()
	conn, err := net.Dial("unix", d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	// The first line of the payload comes with the request: it must not be lost.
	_, err = io.WriteString(conn, "GET /workspaces/a/agent/tcp?port="+port+" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nearly\n")
	if err != nil {
		t.Fatal(err)
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	return conn, br, res
}

func TestTunnel(t *testing.T) {
	d := servertest.Start(t, nil)
	create(t, d, "a")
	conn, br, res := tunnel(t, d, "80")
	defer conn.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res.Status)
	}
	if _, err := io.WriteString(conn, "late\n"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"got early\n", "got late\n"} {
		if line, err := br.ReadString('\n'); line != want {
			t.Fatalf("%q, %v; not %q", line, err, want)
		}
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(br); string(rest) != "bye\n" || err != nil {
		t.Errorf("after the half-close: %q, %v", rest, err)
	}
}

func TestTunnelRefused(t *testing.T) {
	d := servertest.Start(t, nil)
	create(t, d, "a")
	conn, _, res := tunnel(t, d, "9")
	defer conn.Close()
	b, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(b), "connection refused") {
		t.Errorf("%s: %s", res.Status, b)
	}
}

func TestTunnelEnds(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *servertest.Daemon){
		"with the machine": func(_ *testing.T, d *servertest.Daemon) { d.Workspaces.Crash("a") },
		"with the daemon":  func(t *testing.T, d *servertest.Daemon) { d.Stop(t) },
	} {
		t.Run(name, func(t *testing.T) {
			d := servertest.Start(t, nil)
			create(t, d, "a")
			conn, br, _ := tunnel(t, d, "80")
			defer conn.Close()
			if _, err := br.ReadString('\n'); err != nil {
				t.Fatal(err)
			}
			end(t, d)
			if _, err := io.ReadAll(br); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Logf("ended with %v", err)
			}
		})
	}
	// A caller that just closes leaves nothing behind: goleak and Stop tell.
}
