package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/fault"
)

// tunnelTimeout bounds a guest's answer to a connect.
const tunnelTimeout = 15 * time.Second

// maxRefusal bounds what is read of a guest's refusal.
const maxRefusal = 64 << 10

// tunnel connects the caller to a TCP port inside the guest:
//
//	GET /workspaces/REF/agent/tcp?port=8080[&host=127.0.0.1]
//	Connection: Upgrade
//	Upgrade: tcp
//
// 101 and then raw bytes both ways. An end in one direction is passed on as
// far as the link has half-closes; the tunnel ends when both have ended, when
// either breaks, or with the server.
func (p *agentProxy) tunnel(w http.ResponseWriter, r *http.Request, t target) {
	q := r.URL.Query()
	port, err := strconv.ParseUint(q.Get("port"), 10, 16)
	if err != nil || port == 0 {
		p.s.writeError(w, r, fault.New(fault.Invalid, "the port %q is not a number from 1 to 65535", q.Get("port")).
			WithNext("Ask for .../tcp?port=8080."))
		return
	}
	if r.Method != http.MethodGet || r.Header.Get("Upgrade") != "tcp" || r.ProtoMajor != 1 {
		p.s.writeError(w, r, fault.New(fault.Invalid, "a connection to a guest's port needs HTTP/1.1, GET and the header Upgrade: tcp").
			WithNext("Use `client.DialTCP` of the Go client, or send these."))
		return
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	res, err := p.connect(ctx, cancel, t, port, q.Get("host")) //nolint:bodyclose // closed as guest
	if err != nil {
		p.s.writeError(w, r, p.explain(ctx, t, err))
		return
	}
	guest, ok := res.Body.(io.ReadWriteCloser)
	if !ok {
		p.s.writeError(w, r, fmt.Errorf("the link's transport cannot switch protocols (%T)", res.Body))
		return
	}
	defer guest.Close()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		p.s.writeError(w, r, fmt.Errorf("take over the connection: %w", err))
		return
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"); err != nil {
		return
	}
	stop := context.AfterFunc(r.Context(), func() {
		_ = conn.Close()
		_ = guest.Close()
	})
	defer stop()
	// What came with the request is in the buffer; beyond it net/http's reader
	// would take the caller's half-close for the end of the request.
	early, _ := buffered.Peek(buffered.Reader.Buffered())
	splice(conn, io.MultiReader(bytes.NewReader(early), conn), guest)
}

// connect asks the guest for the port. The response is a 101.
func (p *agentProxy) connect(ctx context.Context, cancel context.CancelCauseFunc, t target, port uint64, host string) (*http.Response, error) {
	limit := time.AfterFunc(tunnelTimeout, func() {
		cancel(fault.New(fault.Timeout, "workspace %s did not answer within %s whether its port %d is open", t.workspace, tunnelTimeout, port).
			WithNext("See `agentiso info %s` for its state.", t.workspace))
	})
	defer limit.Stop()
	q := url.Values{"port": {strconv.FormatUint(port, 10)}}
	if host != "" {
		q.Set("host", host)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/agentiso.guest.v1.Guest/Connect?"+q.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "tcp")
	res, err := t.transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusSwitchingProtocols {
		return res, nil
	}
	defer res.Body.Close()
	f := refusal(res)
	return nil, fault.New(fault.Unavailable, "workspace %s: port %d: %s", t.workspace, port, f).
		WithNext("Check that a program listens on that port inside, as with `agentiso exec %s -- ss -ltn`.", t.workspace)
}

// goneCheck is how often a caller that sends nothing more is looked at: has it
// only ended its direction, or gone?
const goneCheck = 500 * time.Millisecond

// splice copies both ways until both directions have ended, one broke, or the
// caller has gone.
func splice(conn net.Conn, fromConn io.Reader, guest io.ReadWriteCloser) {
	down := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(guest, fromConn); err != nil {
			_ = guest.Close()
			return
		}
		// Without half-closes in the link the guest is not told: closing all
		// would cut its answer off.
		closeWrite(guest)
		tick := time.NewTicker(goneCheck)
		defer tick.Stop()
		for {
			select {
			case <-down:
				return
			case <-tick.C:
				if hungUp(conn) {
					_ = guest.Close()
					return
				}
			}
		}
	})
	_, err := io.Copy(conn, guest)
	if err != nil || !closeWrite(conn) {
		_ = conn.Close()
		_ = guest.Close()
	}
	close(down)
	wg.Wait()
}

// closeWrite ends c's sending direction; false if it cannot do only that.
func closeWrite(c any) bool {
	hc, ok := c.(interface{ CloseWrite() error })
	return ok && hc.CloseWrite() == nil
}

// hungUp reports whether the other end of conn is closed altogether, and not
// only done with sending: poll(2) tells the two apart on Unix sockets.
func hungUp(conn net.Conn) bool {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		hup = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return err != nil || hup
}
