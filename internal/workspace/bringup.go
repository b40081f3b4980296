package workspace

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/undo"
)

const (
	// configureLimit is the design's bound on giving a guest its identity,
	// repeats after a dropped link included.
	configureLimit = 10 * time.Second
	// seedBytes of host randomness reseed the guest's generator; 64 is twice
	// what its ChaCha20 key needs.
	seedBytes = 64
	// consoleTail is what an error about a boot shows of the console.
	consoleTail = 2 << 10
	consoleRows = 12
)

// maxAnswer bounds one answer of an agent; statistics, its largest, take some
// hundred bytes.
const maxAnswer = 64 << 10

// guest returns a client of the agent of id. A guest is hostile: its answers
// are bounded and never unpacked.
func (s *Service) guest(id string) guestv1connect.GuestClient {
	return guestv1connect.NewGuestClient(&http.Client{Transport: s.o.Guests.Transport(id)}, "http://guest",
		connect.WithReadMaxBytes(maxAnswer), connect.WithAcceptCompression("gzip", nil, nil))
}

// bringUp starts w's machine over the disk and slot that it has, waits for the
// agent and gives the guest its identity. It fills in w.Machine; what it began
// is on u.
func (s *Service) bringUp(ctx context.Context, c *clock, u *undo.Stack, w *domain.Workspace, boot domain.Boot) error {
	u.Push("machine", func(ctx context.Context) error { return s.o.Machines.Kill(ctx, w.ID) })
	err := c.step(ctx, "machine", func(ctx context.Context) (err error) {
		w.Machine, err = s.o.Machines.Start(ctx, domain.MachineSpec{
			ID: w.ID, Boot: boot, Init: w.Init, CPUs: w.CPUs, MemoryMiB: w.MemoryMiB,
			Disk: w.Disk, Slot: w.Slot, Link: s.o.Link, CID: w.CID, UID: w.UID,
		})
		if err != nil {
			return fmt.Errorf("start machine: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	u.Push("link", func(context.Context) error { s.o.Guests.Close(w.ID); return nil })
	if err := s.o.Guests.Open(w.ID, w.Machine.Endpoint); err != nil {
		return fmt.Errorf("open link: %w", err)
	}
	if err := c.step(ctx, "boot", func(ctx context.Context) error { return s.awaitAgent(ctx, w) }); err != nil {
		return err
	}
	return c.step(ctx, "configure", func(ctx context.Context) error { return s.configure(ctx, w) })
}

// awaitAgent returns when the agent has answered. A machine that ends, or that
// says nothing within BootTimeout, is an error with the console's last lines.
func (s *Service) awaitAgent(ctx context.Context, w *domain.Workspace) error {
	bctx, cancel := context.WithTimeout(ctx, s.o.BootTimeout)
	defer cancel()
	ended := s.o.Machines.Done(w.ID)
	answered := make(chan error, 1)
	go func() {
		for {
			_, err := s.guest(w.ID).Info(bctx, connect.NewRequest(&guestv1.InfoRequest{}))
			if err == nil || bctx.Err() != nil || !dropped(err) || !pause(bctx, linkRetry) {
				answered <- err
				return
			}
		}
	}()
	select {
	case err := <-answered:
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		select {
		case <-ended: // the link ends with the machine: the exit says why
		default:
			if bctx.Err() != nil {
				return s.bootFault(w, fmt.Sprintf("its agent did not answer within %v", s.o.BootTimeout), err)
			}
			return s.bootFault(w, "its agent answered with an error: "+err.Error(), err)
		}
	case <-ended:
		cancel()
		<-answered //nolint:errcheck // the exit says more than the cut-off call
	}
	return s.bootFault(w, "its machine ended: "+s.o.Machines.Exit(w.ID).Reason, nil)
}

// linkRetry spaces repeats of a call whose link dropped; the link's own
// back-off does the rest.
const linkRetry = 20 * time.Millisecond

// dropped reports whether err is a call that the link lost, which a repeat may
// mend.
func dropped(err error) bool {
	return fault.Is(err, fault.Unavailable) || connect.CodeOf(err) == connect.CodeUnavailable
}

// pause waits for d and reports whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// bootFault is the error of a guest that did not come up.
func (s *Service) bootFault(w *domain.Workspace, why string, err error) error {
	msg := fmt.Sprintf("the guest of %s did not come up: %s", w.Name, why)
	if rows := lastRows(s.o.Consoles.Tail(w.ID, consoleTail), consoleRows); len(rows) > 0 {
		msg += "; its console's last lines were:\n  | " + strings.Join(rows, "\n  | ")
	} else {
		msg += "; its console stayed empty"
	}
	return &fault.Error{
		Kind: fault.BootFailed, Msg: msg, Err: err,
		Next: "Check that the image is a Linux root file system (`agentiso image info`), and the host with `agentiso doctor`.",
	}
}

// lastRows returns the last n non-empty lines of a console, with what would
// disturb a terminal taken out: the guest is hostile.
func lastRows(b []byte, n int) []string {
	var rows []string
	for line := range strings.SplitSeq(string(b), "\n") {
		line = strings.TrimSpace(strings.Map(func(r rune) rune {
			if r == '\t' {
				return ' '
			}
			if r < ' ' || r == 0x7f || (r >= 0x80 && r < 0xa0) || r == '\uFFFD' {
				return -1
			}
			return r
		}, line))
		if line != "" {
			rows = append(rows, line)
		}
	}
	return rows[max(0, len(rows)-n):]
}

// configure gives the guest its identity in one round trip, repeated when the
// link drops, and returns only when the agent has confirmed all of it.
func (s *Service) configure(ctx context.Context, w *domain.Workspace) error {
	limited, cancel := context.WithTimeout(ctx, configureLimit)
	defer cancel()
	for {
		_, err := s.guest(w.ID).Configure(limited, connect.NewRequest(identity(w)))
		if err == nil {
			return nil
		}
		if dropped(err) && pause(limited, linkRetry) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if limited.Err() != nil {
			return s.bootFault(w, fmt.Sprintf("it did not take its identity within %v", configureLimit), err)
		}
		return s.bootFault(w, "it refused its identity: "+err.Error(), err)
	}
}

// identity is the one batched message that makes a guest this workspace. The
// clock and the seed are drawn anew for every sending.
func identity(w *domain.Workspace) *guestv1.ConfigureRequest {
	seed := make([]byte, seedBytes)
	_, _ = rand.Read(seed) // never fails: crypto/rand ends the program instead
	r := &guestv1.ConfigureRequest{
		Hostname:        w.Hostname,
		Mac:             w.Slot.MAC,
		WallClockUnixNs: time.Now().UnixNano(),
		RandomSeed:      seed,
		MachineId:       w.MachineID,
		Environment:     w.Env,
		DefaultUser:     w.User,
		DefaultWorkdir:  w.Workdir,
		GrowRoot:        true,
	}
	if w.Slot.Address.IsValid() {
		r.Address = w.Slot.Address.String()
	}
	if w.Slot.Gateway.IsValid() {
		r.Gateway = w.Slot.Gateway.String()
	}
	for _, d := range w.Slot.DNS {
		r.Dns = append(r.Dns, d.String())
	}
	return r
}
