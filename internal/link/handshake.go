package link

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/link/wire"
)

const (
	// staleLimit is how many bytes before the answer to a hello are skipped.
	// The guest's virtqueue holds at most 128 writes of 32 KiB.
	staleLimit = 8 << 20
	// firstResend and lastResend bound the wait for an answer before the next
	// hellos go out; it doubles.
	firstResend = 5 * time.Millisecond
	lastResend  = 100 * time.Millisecond
	// helloWrite bounds one write of hellos: a guest that does not read yet
	// must not keep the host from listening.
	helloWrite = 20 * time.Millisecond
	// startWait bounds the second half of a handshake, whose first half shows
	// that the agent is there.
	startWait = 10 * time.Second
	// readAhead is the buffer between socket and guard. 64 KiB is about what
	// the kernel hands over at once.
	readAhead = 64 << 10
)

// channel is a serial link's connection after its handshake.
type channel struct {
	net.Conn
	r *bufio.Reader
}

func (c *channel) Read(p []byte) (int, error) { return c.r.Read(p) }

// dialSerial connects to the Unix socket at path and brings the agent to the
// beginning of mode. It takes as long as ctx lets it: an agent that is still
// booting answers when it is up.
func dialSerial(ctx context.Context, path string, mode wire.Mode, size int64) (*channel, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	c := &channel{conn, bufio.NewReaderSize(conn, readAhead)}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err = handshake(ctx, c, mode, size)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

// errSilent is what stands in the way while no hello is answered.
var errSilent = errors.New("its port is open but nothing answers")

func handshake(ctx context.Context, c *channel, mode wire.Mode, size int64) error {
	f := wire.Frame{Kind: wire.Hello, Mode: mode, Version: wire.Version, Size: size}
	_, _ = rand.Read(f.Nonce[:]) // it cannot fail
	scan := wire.NewScanner(c.r, staleLimit)

	wait, copies := firstResend, 1
	for answered := false; !answered; {
		if unread(c.Conn) == 0 {
			if err := sendHellos(c.Conn, f.AppendCopies(nil, copies)); err != nil {
				return err
			}
			copies = min(copies*32, wire.Drain)
		}
		var err error
		answered, err = awaitFrame(c, scan, f, wire.Welcome, time.Now().Add(wait))
		switch {
		case err != nil && ctx.Err() != nil:
			return fmt.Errorf("%w: %w", ctx.Err(), errSilent)
		case err != nil:
			return err
		}
		wait = min(2*wait, lastResend)
	}
	// From here on the guest reads what the host sends next: nothing needs to
	// be sent again.
	f.Kind = wire.Start
	if err := c.SetWriteDeadline(time.Now().Add(startWait)); err != nil {
		return err
	}
	if _, err := c.Conn.Write(f.Append(nil)); err != nil {
		return err
	}
	started, err := awaitFrame(c, scan, f, wire.Started, time.Now().Add(startWait))
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ctx.Err(), errSilent)
	case err != nil:
		return err
	case !started:
		return fmt.Errorf("its agent fell silent in the handshake for %v", startWait)
	}
	return c.SetDeadline(time.Time{})
}

// awaitFrame skips to the frame of that kind with f's nonce. It reports false
// if the deadline passes first.
func awaitFrame(c *channel, scan *wire.Scanner, f wire.Frame, kind wire.Kind, deadline time.Time) (bool, error) {
	if err := c.SetDeadline(deadline); err != nil {
		return false, err
	}
	for {
		got, err := scan.Next()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return false, nil
		case errors.Is(err, wire.ErrTooMuch):
			return false, &wire.ViolationError{Detail: err.Error()}
		case err != nil:
			return false, err
		}
		if got.Kind != kind || got.Nonce != f.Nonce {
			continue // of an earlier session
		}
		if got.Version != wire.Version {
			return false, &wire.ViolationError{Detail: fmt.Sprintf("it speaks version %d, this daemon version %d", got.Version, wire.Version)}
		}
		return true, nil
	}
}

// sendHellos writes hellos, or as much of them as goes.
func sendHellos(c net.Conn, hellos []byte) error {
	if err := c.SetWriteDeadline(time.Now().Add(helloWrite)); err != nil {
		return err
	}
	if _, err := c.Write(hellos); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// unread returns how many bytes QEMU has not read yet; 0 when that is not
// known. While the guest has not opened its port QEMU reads nothing, and
// hellos would only pile up.
func unread(c net.Conn) int {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return 0
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return 0
	}
	var n int
	if rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }) != nil || err != nil {
		return 0
	}
	return n
}
