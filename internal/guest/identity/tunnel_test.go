package identity

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// serveTunnels returns the address of a server of Tunnels.
func serveTunnels(t *testing.T) (*Tunnels, string) {
	t.Helper()
	tn := NewTunnels(quiet())
	srv := httptest.NewServer(tn)
	t.Cleanup(func() {
		if err := tn.Close(); err != nil {
			t.Error(err)
		}
		srv.Close()
	})
	return tn, srv.Listener.Addr().String()
}

// listen returns the port of a TCP server that runs serve for each connection.
func listen(t *testing.T, serve func(*net.TCPConn)) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		work.Wait()
	})
	return l.Addr().(*net.TCPAddr).Port
}

// upgrade asks for a stream; the connection is the caller's if the status is
// 101.
func upgrade(t *testing.T, addr, query string) (*net.TCPConn, *bufio.Reader, *http.Response) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	// Bytes sent before the answer must reach the port as well.
	fmt.Fprintf(c, "GET /Connect?%s HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: TCP\r\n\r\nearly ", query)
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), r, res
}

func TestTunnelHalfClose(t *testing.T) {
	_, addr := serveTunnels(t)
	data := make([]byte, 5<<20)
	_, _ = rand.Read(data)
	// The port answers only after it has seen the end.
	port := listen(t, func(c *net.TCPConn) {
		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		_, _ = c.Write(b)
	})
	c, r, res := upgrade(t, addr, fmt.Sprintf("port=%d", port))
	if res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Upgrade") != "tcp" {
		t.Fatalf("%v", res)
	}
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, append([]byte("early "), data...)) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
}

func TestTunnelPortEndsFirst(t *testing.T) {
	_, addr := serveTunnels(t)
	rest := make(chan string, 1)
	port := listen(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "bye")
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		rest <- string(b)
	})
	c, r, _ := upgrade(t, addr, fmt.Sprintf("port=%d&host=localhost", port))
	if got, err := io.ReadAll(r); err != nil || string(got) != "bye" {
		t.Errorf("%q, %v", got, err)
	}
	_, _ = io.WriteString(c, "late")
	_ = c.CloseWrite()
	if got := <-rest; got != "early late" {
		t.Errorf("port got %q", got)
	}
}

func TestTunnelErrors(t *testing.T) {
	_, addr := serveTunnels(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := l.Addr().(*net.TCPAddr).Port
	l.Close()
	for query, want := range map[string]string{
		"":                         `400 {"code":"invalid_argument","message":"port \"\" is not between 1 and 65535"}`,
		"port=0":                   `400 {"code":"invalid_argument","message":"port \"0\" is not between 1 and 65535"}`,
		"port=80&host=example.org": `400 {"code":"invalid_argument","message":"host \"example.org\" is not an address"}`,
		"port=80&host=192.0.2.1":   `403 {"code":"invalid_argument","message":"host 192.0.2.1 is not an address of this guest"}`,
		"port=80&host=fe80::1%25a": `400 {"code":"invalid_argument","message":"host \"fe80::1%a\" is not an address"}`,
		fmt.Sprintf("port=%d", free): fmt.Sprintf(
			`502 {"code":"unavailable","message":"connect to 127.0.0.1:%d: connect: connection refused"}`, free),
	} {
		_, _, res := upgrade(t, addr, query)
		b, err := io.ReadAll(io.LimitReader(res.Body, 1<<10))
		if got := fmt.Sprintf("%d %s", res.StatusCode, strings.TrimSpace(string(b))); got != want || err != nil {
			t.Errorf("%s: %s, %v; want %s", query, got, err, want)
		}
	}
	res, err := http.Get("http://" + addr + "/Connect?port=80")
	if err != nil || res.StatusCode != http.StatusUpgradeRequired {
		t.Errorf("without upgrade: %v, %v", res, err)
	}
	res.Body.Close()
	http.DefaultClient.CloseIdleConnections()
}

func TestTunnelClose(t *testing.T) {
	tn, addr := serveTunnels(t)
	port := listen(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	_, r, res := upgrade(t, addr, fmt.Sprintf("port=%d", port))
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v", res)
	}
	if err := tn.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadByte(); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("read %v, want an end", err)
	}
	if _, _, res := upgrade(t, addr, fmt.Sprintf("port=%d", port)); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("after Close: %v", res.Status)
	}
}
