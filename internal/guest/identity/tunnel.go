package identity

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
)

// Limits of the TCP connect stream.
const (
	maxTunnels = 512
	tunnelDial = 5 * time.Second
	// halfOpen is how long one direction may be silent after the other has
	// ended. Before that a connection may be idle for ever, as between
	// machines.
	halfOpen     = 5 * time.Minute
	tunnelBuffer = 32 << 10
)

// Tunnels serves the TCP connect stream of agentiso.guest.v1.Guest: an HTTP/1.1
// upgrade after which the connection carries the bytes of a TCP connection to
// a port of this guest, by loopback or one of the guest's own addresses. An end
// of file is passed on in either direction, as far as the carrier has
// CloseWrite; without it the end of the guest's side ends both.
//
//	GET …/Connect?port=8080[&host=127.0.0.1]
//
// Errors are JSON {code, message}: 400 bad parameters, 403 an address that is
// not the guest's, 426 no upgrade asked for or no HTTP/1.1, 502 the port
// refuses, 503 too many connections or closing.
type Tunnels struct {
	log *slog.Logger

	mu     sync.Mutex
	closed bool
	live   map[*tunnel]struct{}
	work   sync.WaitGroup
}

type tunnel struct{ carrier, port net.Conn }

// NewTunnels returns a handler; it starts nothing.
func NewTunnels(log *slog.Logger) *Tunnels {
	return &Tunnels{log: log, live: make(map[*tunnel]struct{})}
}

// Close cuts all connections and waits for them.
func (t *Tunnels) Close() error {
	t.mu.Lock()
	t.closed = true
	for tn := range t.live {
		tn.cut()
	}
	t.mu.Unlock()
	t.work.Wait()
	return nil
}

func (tn *tunnel) cut() {
	if tn.carrier != nil {
		_ = tn.carrier.Close()
	}
	if tn.port != nil {
		_ = tn.port.Close()
	}
}

// ServeHTTP returns when the connection has ended.
func (t *Tunnels) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 || !hasToken(r.Header, "Connection", "upgrade") || !hasToken(r.Header, "Upgrade", "tcp") {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "tcp")
		refuse(w, http.StatusUpgradeRequired, connect.CodeInvalidArgument, errors.New("this path wants an HTTP/1.1 upgrade to tcp"))
		return
	}
	addr, status, err := target(r)
	if err != nil {
		refuse(w, status, connect.CodeInvalidArgument, err)
		return
	}
	tn := &tunnel{}
	if !t.enter(tn) {
		refuse(w, http.StatusServiceUnavailable, connect.CodeResourceExhausted,
			fmt.Errorf("no more than %d connections at one time", maxTunnels))
		return
	}
	defer t.leave(tn)
	ctx, cancel := context.WithTimeout(r.Context(), tunnelDial)
	defer cancel()
	var d net.Dialer
	port, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		refuse(w, http.StatusBadGateway, connect.CodeUnavailable, fmt.Errorf("connect to %s: %w", addr, dialCause(err)))
		return
	}
	defer port.Close()
	carrier, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		refuse(w, http.StatusUpgradeRequired, connect.CodeInvalidArgument, fmt.Errorf("upgrade: %w", err))
		return
	}
	defer carrier.Close()
	if !t.connected(tn, carrier, port) {
		return
	}
	// The server's deadlines for reading the request are still set.
	if err := carrier.SetDeadline(time.Time{}); err != nil {
		return
	}
	_, err = io.WriteString(carrier, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
	if err != nil {
		return
	}
	join(carrier, rw.Reader, port)
}

func (t *Tunnels) enter(tn *tunnel) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || len(t.live) >= maxTunnels {
		return false
	}
	t.live[tn] = struct{}{}
	t.work.Add(1)
	return true
}

func (t *Tunnels) leave(tn *tunnel) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, tn)
	t.work.Done()
}

// connected notes what Close has to cut; false after Close.
func (t *Tunnels) connected(tn *tunnel, carrier, port net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tn.carrier, tn.port = carrier, port
	return !t.closed
}

// target is the address that a request names, which must be the guest's own:
// the host must not be used as a way into the guest's network.
func target(r *http.Request) (addr string, status int, err error) {
	q := r.URL.Query()
	port, err := strconv.ParseUint(q.Get("port"), 10, 16)
	if err != nil || port == 0 {
		return "", http.StatusBadRequest, fmt.Errorf("port %.16q is not between 1 and 65535", q.Get("port"))
	}
	host := q.Get("host")
	if host == "" || host == "localhost" {
		host = "127.0.0.1"
	}
	ip, err := netip.ParseAddr(host)
	if err != nil || ip.Zone() != "" {
		return "", http.StatusBadRequest, fmt.Errorf("host %.64q is not an address", host)
	}
	ip = ip.Unmap()
	if !ip.IsLoopback() && !own(ip) {
		return "", http.StatusForbidden, fmt.Errorf("host %v is not an address of this guest", ip)
	}
	return net.JoinHostPort(ip.String(), strconv.FormatUint(port, 10)), 0, nil
}

// own reports whether ip is an address of one of the guest's interfaces.
func own(ip netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if got, ok := netip.AddrFromSlice(n.IP); ok && got.Unmap() == ip {
				return true
			}
		}
	}
	return false
}

// join copies both ways until both have ended.
func join(carrier net.Conn, buffered *bufio.Reader, port net.Conn) {
	var half atomic.Bool
	var both sync.WaitGroup
	both.Go(func() { pipe(port, carrier, buffered, &half) })
	both.Go(func() { pipe(carrier, port, port, &half) })
	both.Wait()
}

// pipe copies src, which reads from, to to, and passes the end on. An error on
// the way, and an end that cannot be passed on, ends both directions. half
// becomes true when one direction has ended in order: from then on the other
// one may be silent for halfOpen only.
func pipe(to, from net.Conn, src io.Reader, half *atomic.Bool) {
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, &idleReader{src, from, half}, make([]byte, tunnelBuffer))
	if c, ok := to.(interface{ CloseWrite() error }); ok && err == nil && c.CloseWrite() == nil {
		half.Store(true)
		_ = to.SetReadDeadline(time.Now().Add(halfOpen)) // it may be in a read now
		return
	}
	_ = to.Close()
	_ = from.Close()
}

// idleReader limits each read once half is true.
type idleReader struct {
	io.Reader
	conn net.Conn
	half *atomic.Bool
}

func (r *idleReader) Read(b []byte) (int, error) {
	if r.half.Load() {
		_ = r.conn.SetReadDeadline(time.Now().Add(halfOpen))
	}
	return r.Reader.Read(b)
}

func hasToken(h http.Header, name, token string) bool {
	for _, v := range h.Values(name) {
		for f := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(f), token) {
				return true
			}
		}
	}
	return false
}

// dialCause is the reason of a failed dial without the address again.
func dialCause(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// refuse answers with an error as Connect's unary calls do.
func refuse(w http.ResponseWriter, status int, code connect.Code, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"code": code.String(), "message": err.Error()})
}
