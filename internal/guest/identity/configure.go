package identity

import (
	"context"
	"fmt"
	"path"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	guestv1 "github.com/agentiso/agentiso/api/agentiso/guest/v1"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// Configure gives the guest its identity; see the package comment. Errors:
// invalid_argument (the request), failed_precondition (this guest cannot: no
// network interface, no such user, a frozen root), internal (the kernel or the
// disk refused).
func (s *Service) Configure(ctx context.Context, req *connect.Request[guestv1.ConfigureRequest]) (*connect.Response[guestv1.ConfigureResponse], error) {
	received := time.Now()
	r, err := parseRequest(req.Msg)
	if err != nil {
		return nil, configureError(connect.CodeInvalidArgument, err)
	}
	if err := s.begin(ctx); err != nil {
		return nil, err
	}
	defer s.end()
	defer clear(r.seed)
	root, err := openRoot(s.opt.Root)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	defer root.close()
	accounts := users.DB{Passwd: path.Join(s.opt.Root, "etc/passwd"), Group: path.Join(s.opt.Root, "etc/group")}
	if err := r.checkGuest(accounts); err != nil {
		return nil, configureError(connect.CodeInvalidArgument, err)
	}
	if len(r.linkKey) > 0 && s.opt.LinkKey == nil {
		return nil, configureError(connect.CodeInternal, fieldErrorf("link_key", "%w: the link has no key", errUnsuitable))
	}
	nic, err := openNIC(s.opt.Interface, r)
	if err != nil {
		return nil, configureError(connect.CodeInternal, err)
	}
	defer nic.close()

	now := s.opt.Store.Current()
	now.Configured = false
	s.opt.Store.set(now)
	size, err := s.apply(r, root, nic, received)
	if err != nil {
		return nil, configureError(connect.CodeInternal, err)
	}
	d := time.Since(received)
	s.opt.Log.Info("configured", "op", "configure", "dur", d)
	return connect.NewResponse(&guestv1.ConfigureResponse{DurationNs: int64(d), RootBytes: size}), nil
}

// apply makes r the guest's identity. The error is a *FieldError.
func (s *Service) apply(r *request, root *root, nic *nic, received time.Time) (rootBytes int64, err error) {
	if err := s.sys.addEntropy(r.seed); err != nil {
		return 0, &FieldError{"random_seed", err}
	}
	now := time.Now()
	wall := r.clock.Add(now.Sub(received))
	if err := s.sys.setClock(wall); err != nil {
		return 0, &FieldError{"wall_clock_unix_ns", err}
	}
	s.opt.Log.Info("set clock", "op", "configure", "skew", wall.Sub(now.Round(0)))
	if err := nic.apply(r); err != nil {
		return 0, err
	}
	if len(r.dns) > 0 {
		if err := root.replace("etc/resolv.conf", resolvConf(r), 0o644); err != nil {
			return 0, &FieldError{"dns", err}
		}
	}
	if r.hostname != "" {
		if err := s.applyHostname(r.hostname, root); err != nil {
			return 0, &FieldError{"hostname", err}
		}
	}
	if r.machineID != "" {
		for _, name := range []string{"etc/machine-id", "run/machine-id"} {
			if err := root.replace(name, []byte(r.machineID+"\n"), 0o444); err != nil {
				return 0, &FieldError{"machine_id", err}
			}
		}
	}
	if len(r.linkKey) > 0 {
		if err := s.opt.LinkKey(r.linkKey); err != nil {
			return 0, &FieldError{"link_key", err}
		}
	}
	if r.grow {
		if rootBytes, err = s.sys.resize(s.opt.Root); err != nil {
			return 0, &FieldError{"grow_root", err}
		}
	}
	s.opt.Store.set(r.snapshot(s.opt.Store.Current()))
	return rootBytes, nil
}

// snapshot is the identity after r over the one before.
func (r *request) snapshot(old Snapshot) Snapshot {
	if r.hostname != "" {
		old.Hostname = r.hostname
	}
	if len(r.env) > 0 {
		old.Env = r.env
	}
	if r.user != "" {
		old.DefaultUser = r.user
	}
	if r.workdir != "" {
		old.Workdir = path.Clean(r.workdir)
	}
	if r.token != "" {
		old.AccessToken = r.token
	}
	old.Configured = true
	return old
}

func (s *Service) applyHostname(name string, root *root) error {
	if err := s.sys.setHostname(name); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := root.replace("etc/hostname", []byte(name+"\n"), 0o644); err != nil {
		return err
	}
	old, err := root.read("etc/hosts", maxHosts)
	if err != nil {
		return err
	}
	return root.replace("etc/hosts", hostsFile(old, name), 0o644)
}

func resolvConf(r *request) []byte {
	var b strings.Builder
	b.WriteString("# Written by agentiso.\n")
	for _, a := range r.dns {
		fmt.Fprintf(&b, "nameserver %v\n", a)
	}
	return []byte(b.String())
}

// setClock sets CLOCK_REALTIME.
func setClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}
